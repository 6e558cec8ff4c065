//! Files that are either old or new, never half of each.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::common::failure::{Failure, Result};

/// Writes beside `path`, then renames: whoever reads `path` sees all of the old bytes or all of the new ones.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let write = || {
        let mut file = File::create(&name)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&name, path)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&name); // part of it at most, or none
        Failure::output(path.display(), error)
    })
}
