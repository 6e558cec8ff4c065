//! The emulator's calibration kernels are PTX that a driver accepts: ptxas assembles every one.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use ptx_emulator::calibration::cases;

#[test]
fn ptxas_assembles_every_calibration_kernel() {
    let ptxas = Path::new(env!("FUSED_LORA_NVCC")).with_file_name("ptxas");
    if !ptxas.is_file() {
        common::skipped(
            "ptxas_assembles_every_calibration_kernel",
            "ptxas is not where it was when this test was built",
        );
        return;
    }
    let folder = common::scratch().join("calibration");
    fs::create_dir_all(&folder).expect("a folder");
    for case in cases() {
        let (ptx, cubin) = (folder.join("k.ptx"), folder.join("k.cubin"));
        fs::write(&ptx, &case.ptx).expect("a written file");
        let arch = format!("-arch=sm_{}{}", case.arch, if case.exact_arch { "a" } else { "" });
        let output = Command::new(&ptxas).arg(arch).arg("-o").args([&cubin, &ptx]).output().expect("ptxas runs");
        assert!(output.status.success(), "{}: {}\n{}", case.name, String::from_utf8_lossy(&output.stderr), case.ptx);
    }
}
