//! Sets the SONAME of the shared library, and writes `include/kvlane.h` if the feature `regen-header` is on.

/// The major version of the ABI, which `kvl_abi_version` returns too; `tests/ffi.rs` compares them.
const ABI_MAJOR: u32 = 0;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let set = |name: &str| std::env::var_os(name).is_some();
    // cargo-c sets it itself, from `Cargo.toml`.
    if set("CARGO_FEATURE_CAPI") && !set("CARGO_CFG_CARGO_C") {
        // The name under which programs load the library at run time.
        match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
            Ok("linux" | "android" | "freebsd" | "netbsd" | "openbsd" | "dragonfly") => {
                println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvlane.so.{ABI_MAJOR}");
            }
            Ok("macos" | "ios") => {
                println!("cargo:rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libkvlane.{ABI_MAJOR}.dylib");
            }
            _ => {}
        }
    }
    #[cfg(feature = "regen-header")]
    header::regenerate();
}

#[cfg(feature = "regen-header")]
mod header {
    use std::path::Path;

    /// The files of `src/capi` in the order in which the header has their constants, types and functions.
    const SUBJECTS: [&str; 28] = [
        "library",
        "status",
        "dtype",
        "format",
        "isa",
        "kernels",
        "context",
        "tuning",
        "views",
        "scales",
        "runner",
        "pool",
        "memory",
        "rope",
        "norm",
        "hadamard",
        "layout",
        "write",
        "read",
        "copies",
        "masks",
        "attention",
        "prefix",
        "merge",
        "plan",
        "cache",
        "chunks",
        "shard",
    ];
    /// Files that declare nothing of the header.
    const INTERNAL: [&str; 4] = ["mod", "guard", "sized", "arguments"];

    /// Writes the header if it differs from the sources, and tells the tests whether it did.
    pub fn regenerate() {
        let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
        let root = Path::new(&root);
        let (sources, committed) = (root.join("src/capi"), root.join("include/kvlane.h"));
        // Watch the header too, so that the next build finds it current after it has been written.
        for path in [&sources, &committed] {
            println!("cargo:rerun-if-changed={}", path.display());
        }
        let config = cbindgen::Config::from_file(sources.join("cbindgen.toml")).expect("cbindgen.toml is valid");
        let mut names: Vec<String> = std::fs::read_dir(&sources)
            .expect("src/capi is there")
            .filter_map(|entry| {
                entry.expect("and can be listed").path().to_str()?.strip_suffix(".rs").map(str::to_owned)
            })
            .map(|path| path.rsplit(['/', '\\']).next().unwrap_or_default().to_owned())
            .collect();
        names.retain(|name| !SUBJECTS.contains(&name.as_str()) && !INTERNAL.contains(&name.as_str()));
        assert!(names.is_empty(), "build.rs knows no place in the header for {names:?} of src/capi");
        // File by file, because parsing the whole crate would start another cargo.
        let header = SUBJECTS
            .iter()
            .fold(cbindgen::Builder::new().with_config(config), |builder, name| {
                builder.with_src(sources.join(name).with_extension("rs"))
            })
            .generate()
            .expect("the sources of the C ABI are valid");
        let mut generated = Vec::new();
        header.write(&mut generated);
        let stale = std::fs::read(&committed).ok().as_ref() != Some(&generated);
        if stale {
            println!("cargo:warning=include/kvlane.h did not fit the sources and has been rewritten");
            std::fs::write(&committed, generated).expect("include/ can be written");
        }
        println!("cargo:rustc-env=KVLANE_HEADER_WAS={}", if stale { "stale" } else { "current" });
    }
}
