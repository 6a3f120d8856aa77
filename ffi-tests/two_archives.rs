//! The other archive of `two_archives.c`.

/// # Safety
/// None is needed; it is `extern` only.
#[unsafe(no_mangle)]
pub extern "C" fn other_rust(x: i32) -> i32 {
    std::panic::set_hook(Box::new(|_| ()));
    std::panic::catch_unwind(|| 2 / x).unwrap_or(-1)
}
