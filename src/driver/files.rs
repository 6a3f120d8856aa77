//! Opening files that a user names.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use super::error::{Error, Result};

/// Opens a regular file. Opening anything else could wait for ever, and a device cannot be mapped.
pub(super) fn open(path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a directory" } else { "a device, a pipe or a socket" };
        return Err(Error::argument(format!("{} is {kind}, not a file", path.display())));
    }
    File::open(path).map_err(|e| Error::io(path, e))
}

/// Maps a regular file. It must not be changed or shortened while it is mapped.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = open(path)?;
    if file.metadata().map_err(|e| Error::io(path, e))?.len() == 0 {
        return Err(Error::malformed(format!("{} is empty", path.display())));
    }
    // SAFETY: the mapping is private and read-only, and the documentation requires that the file is not changed or
    // shortened.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}
