//! Opening files that a user names.

use std::fs::File;
use std::io::Read;
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

/// The text of a regular file of a size that configuration has.
pub(super) fn text(path: &Path) -> Result<String> {
    String::from_utf8(bytes(path)?).map_err(|e| Error::malformed(format!("{}: {e}", path.display())))
}

/// The bytes of such a file.
pub(super) fn bytes(path: &Path) -> Result<Vec<u8>> {
    // Far above the size of any real one.
    const MOST: u64 = 256 << 20;
    let mut bytes = Vec::new();
    open(path)?.take(MOST + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MOST {
        return Err(Error::malformed(format!("{} is larger than {MOST} bytes", path.display())));
    }
    Ok(bytes)
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
