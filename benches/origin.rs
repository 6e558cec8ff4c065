//! Where a measurement comes from: what a file of results says of itself.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// The first line that a program prints, where it runs, succeeds and prints one.
pub fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
    Some(text).filter(|line| !line.is_empty())
}

/// A bundle says what it was built from; elsewhere it is the checkout.
pub fn commit() -> Option<String> {
    let checkout = || said("git", &["describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]);
    option_env!("FUSED_LORA_COMMIT").map(str::to_owned).or_else(checkout)
}

pub fn driver() -> Option<String> {
    said("nvidia-smi", &["--query-gpu=driver_version", "--format=csv,noheader"])
}

pub fn date() -> Option<String> {
    said("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"])
}

/// The command that started this process.
pub fn command() -> String {
    typed(std::env::var("FUSED_LORA_COMMAND").ok(), std::env::args_os())
}

/// What make says that it was called with; else the program's own arguments, its name without folder and cargo's hash.
pub fn typed(of_make: Option<String>, argv: impl IntoIterator<Item = OsString>) -> String {
    if let Some(command) = of_make.filter(|command| !command.is_empty()) {
        return command;
    }
    let mut words = argv.into_iter().map(|word| word.to_string_lossy().into_owned());
    let program = words.next().unwrap_or_default();
    let name = Path::new(&program).file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let is_hash = |end: &str| end.len() == 16 && end.bytes().all(|byte| byte.is_ascii_hexdigit());
    let name = name.rsplit_once('-').filter(|(_, end)| is_hash(end)).map_or(name.as_str(), |(name, _)| name);
    std::iter::once(name.to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}
