//! Scratch memory that the caller keeps between calls.

use crate::error::{Result, ensure};

/// Checks address and size of a workspace.
pub(crate) fn check_workspace((data, bytes): (*mut u8, usize), needed: usize) -> Result<()> {
    ensure!(bytes >= needed, Workspace, "the workspace has {bytes} bytes, but this call needs {needed}");
    if needed == 0 { Ok(()) } else { check_alignment(data) }
}

/// Checks the address of a workspace.
pub(crate) fn check_alignment(data: *mut u8) -> Result<()> {
    ensure!(
        !data.is_null() && data.addr().is_multiple_of(64),
        Workspace,
        "the workspace at {:#x} is not aligned to 64 bytes",
        data.addr()
    );
    Ok(())
}

/// 64 bytes, aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Scratch memory for [`attention`](crate::attention()) and the other operations that take it. It grows when a call needs more,
/// and never shrinks.
///
/// Once it is as large as the largest call needs ([`attention_workspace_size`](crate::attention_workspace_size)), no call
/// allocates.
///
/// Thread safety: one call at a time uses a workspace, which `&mut` ensures.
#[derive(Default)]
pub struct Workspace {
    lines: Vec<Line>,
}

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// A workspace of at least `bytes` bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut workspace = Self::new();
        workspace.reserve(bytes);
        workspace
    }

    /// Grows to at least `bytes` bytes; the contents are lost.
    pub fn reserve(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(size_of::<Line>());
        if lines > self.lines.len() {
            // Scratch has no contents to keep: do not copy it.
            self.lines = Vec::new();
            self.lines.resize(lines, Line([0; 64]));
        }
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Whether its size is 0.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workspace").field("bytes", &self.len()).finish()
    }
}
