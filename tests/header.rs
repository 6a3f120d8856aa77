//! `include/kvlane.h` agrees with the sources.
#![cfg(feature = "regen-header")]

#[test]
fn the_header_is_current() {
    // The build script writes the header if it differs, so that the first run fails and the next passes.
    assert_eq!(
        env!("KVLANE_HEADER_WAS"),
        "current",
        "include/kvlane.h did not fit src/capi; it has just been rewritten: look at the difference, and commit it"
    );
}
