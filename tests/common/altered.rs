//! Kernels other than they should be: copies of the sources with edits, PTX with other instructions.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// One edit of a source file: `old` must be there, once.
#[derive(Clone, Copy, Debug)]
pub struct Edit<'a> {
    pub file: &'a str,
    pub old: &'a str,
    pub new: &'a str,
}

/// Whether there is what [`compile`] needs; else the test is over.
pub fn can_compile(test: &str) -> bool {
    let can = Path::new(env!("FUSED_LORA_NVCC")).is_file() && super::project().join("kernels").is_dir();
    if !can {
        super::skipped(test, "nvcc or the kernels are not where they were when this test was built");
    }
    can
}

/// PTX for `arch` of the file `source` of the kernels, of which `folder` gets a copy with the edits made.
pub fn compile(source: &str, arch: &str, edits: &[Edit<'_>], folder: &Path) -> String {
    super::copy_folder(&super::project().join("kernels"), folder);
    for Edit { file, old, new } in edits {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).expect("a source file");
        assert_eq!(text.matches(old).count(), 1, "`{old}` is not once in {file}");
        fs::write(&path, text.replace(old, new)).expect("a written file");
    }
    let ptx = folder.join("out.ptx");
    let output = Command::new(env!("FUSED_LORA_NVCC"))
        .args(["-std=c++17", "-O3", "-lineinfo", "-ptx", &format!("-arch={arch}"), "-o"])
        .args([&ptx, &folder.join(source)])
        .output()
        .expect("nvcc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::read_to_string(ptx).expect("PTX")
}

/// One instruction of a kernel, by its line in the PTX, with what stands in its place.
pub struct Site {
    /// From 0.
    pub line: usize,
    pub text: String,
    pub replacement: String,
    /// The line of the CUDA source that it is from.
    pub source: String,
}

/// The CUDA sources that a PTX file names.
pub struct Sources<'a> {
    files: BTreeMap<&'a str, &'a str>,
    texts: BTreeMap<&'a str, String>,
}

impl<'a> Sources<'a> {
    pub fn new(ptx: &'a str) -> Self {
        let files = ptx
            .lines()
            .filter_map(|line| line.trim().strip_prefix(".file")?.trim().split_once(char::is_whitespace))
            .map(|(index, name)| (index, name.trim().trim_matches('"')))
            .collect();
        Self { files, texts: BTreeMap::new() }
    }

    /// The source line of a place, which begins with the numbers of file and line.
    fn line(&mut self, place: &str) -> String {
        let mut numbers = place.split_whitespace();
        let (file, number) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        let path = self.files.get(file).copied().unwrap_or_default();
        let number: usize = number.parse().unwrap_or(0);
        let text = self.texts.entry(path).or_insert_with(|| fs::read_to_string(path).unwrap_or_default());
        text.lines().nth(number.saturating_sub(1)).unwrap_or_default().trim().to_owned()
    }

    /// The source line of a `.loc` directive, and the outermost one that it is inlined in.
    pub fn lines(&mut self, directive: &str) -> [String; 2] {
        let place = directive.trim_start_matches(".loc");
        let outer = place.rsplit_once("inlined_at ").map_or(place, |(_, outer)| outer);
        [self.line(place), self.line(outer)]
    }
}

/// The lines of a PTX file, and the instructions of one of its kernels that `weakened` has something else for.
pub fn sites(ptx: &str, kernel: &str, weakened: impl Fn(&str) -> Option<String>) -> (Vec<String>, Vec<Site>) {
    let mut sources = Sources::new(ptx);
    let (mut lines, mut sites, mut source, mut inside) = (Vec::new(), Vec::new(), String::new(), false);
    for line in ptx.lines() {
        let trimmed = line.trim();
        if trimmed.starts_with(".visible .entry") {
            inside = trimmed.contains(&format!("{kernel}("));
        }
        if inside && trimmed.starts_with(".loc") {
            // The place the instruction's wrapper is called from says more than the wrapper.
            [_, source] = sources.lines(trimmed);
        }
        if inside && let Some(replacement) = weakened(trimmed) {
            sites.push(Site { line: lines.len(), text: trimmed.to_owned(), replacement, source: source.clone() });
        }
        lines.push(line.to_owned());
    }
    (lines, sites)
}
