//! The version of the library and of its ABI.

use std::ffi::c_char;

/// The version of the ABI that this header describes: `major * 65536 + minor`. A library of the same major version and
/// of this or a higher minor version serves it. The SONAME carries the major version.
pub const KVL_ABI_VERSION: u32 = 4;

/// The version of the ABI of the library: `major * 65536 + minor`, to compare with `KVL_ABI_VERSION`.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_abi_version() -> u32 {
    KVL_ABI_VERSION
}

/// The version of the library, such as "0.1.0"; a constant.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
