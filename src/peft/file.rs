//! Files: read whole with a bound, written beside and renamed.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Error, ErrorKind, Result};

fn io(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| ErrorKind::Io { what, kind: error.kind(), message: error.to_string() }.into()
}

/// Reads a regular file of at most `max` bytes into one allocation of its size.
pub(super) fn read(path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(io("open"))?;
    let meta = file.metadata().map_err(io("inspect"))?;
    let refuse =
        |message: String| Error::from(ErrorKind::Io { what: "read", kind: std::io::ErrorKind::InvalidInput, message });
    if !meta.is_file() {
        return Err(refuse("it is not a regular file".into()));
    }
    if meta.len() > max {
        return Err(refuse(format!("it has {} bytes, at most {max} are accepted", meta.len())));
    }
    let mut bytes = Vec::new();
    let size = usize::try_from(meta.len()).map_err(|_| refuse("it exceeds the address space".into()))?;
    bytes.try_reserve_exact(size).map_err(|_| refuse(format!("out of memory for its {size} bytes")))?;
    file.take(meta.len()).read_to_end(&mut bytes).map_err(io("read"))?;
    Ok(bytes)
}

/// Writes `files` (name and content) into `dir`, which is made where it is absent. All are complete on the disk, under
/// other names, before the first takes its own.
pub(super) fn replace<const N: usize>(dir: &Path, files: [(&str, &[u8]); N]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| io("make the folder")(error).at(dir))?;
    let mut pending = Vec::with_capacity(N);
    for (name, content) in files {
        pending.push(Pending::write(dir.join(name), content)?);
    }
    pending.into_iter().try_for_each(Pending::commit)
}

/// A file under a temporary name. Removed unless it takes its own.
struct Pending {
    temporary: PathBuf,
    path: PathBuf,
}

impl Pending {
    fn write(path: PathBuf, content: &[u8]) -> Result<Self> {
        // Two threads may save into one folder: the later wins, with whole files.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        if path.is_dir() {
            let message = "it is a folder".into();
            return Err(Error::from(ErrorKind::Io {
                what: "replace",
                kind: std::io::ErrorKind::IsADirectory,
                message,
            })
            .at(&path));
        }
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!(".{}-{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let pending = Self { temporary: temporary.into(), path };
        let write = || {
            let mut file = File::create(&pending.temporary)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|error| io("write")(error).at(&pending.path))?;
        Ok(pending)
    }

    fn commit(self) -> Result<()> {
        std::fs::rename(&self.temporary, &self.path).map_err(|error| io("replace")(error).at(&self.path))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Gone already where it took its name.
        let _ = std::fs::remove_file(&self.temporary);
    }
}
