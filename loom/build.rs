//! Tells the engine's files that they are built with loom: their own tests are left out.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(qblkd_loom)");
    println!("cargo:rustc-cfg=qblkd_loom");
}
