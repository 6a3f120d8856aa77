//! `include/kvlane.h` is what the sources say.
#![cfg(feature = "regen-header")]

#[test]
fn the_header_is_current() {
    // The build script compares, and writes the header where it differs: so the first run fails, and the next finds it right.
    assert_eq!(
        env!("KVLANE_HEADER_WAS"),
        "current",
        "include/kvlane.h did not fit src/capi; it has just been rewritten: look at the difference, and commit it"
    );
}
