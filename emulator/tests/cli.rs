//! The command line program, through the function behind it.

#[path = "../src/bin/ptx-emulator/cli.rs"]
mod cli;

use std::path::PathBuf;

const SCALE: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 in, .param .u64 out, .param .f32 by)
{
    .reg .f32 %f<4>;
    .reg .b32 %r<2>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    ld.param.f32 %f1, [by];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.f32 %f2, [%rd4];
    mul.f32 %f3, %f1, %f2;
    st.global.f32 [%rd5], %f3;
    ret;
}";

/// A folder of a test's own, with files in it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cli").join(test);
        std::fs::create_dir_all(&folder).expect("a folder");
        Folder(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.0.join(name), content).expect("a written file");
        self.path(name)
    }
}

/// Exit status and both outputs.
fn run(words: &[&str]) -> (u8, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = cli::main(words.iter().map(Into::into), &mut out, &mut err);
    (status, String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"))
}

#[test]
fn a_kernel_runs_on_buffers_from_files() {
    let folder = Folder::new("run");
    let ptx = folder.write("scale.ptx", SCALE);
    let input: Vec<u8> = (0..32u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let buffer = format!("in=@{}", folder.write("in.bin", input));
    let saved = folder.path("out.bin");
    let save = format!("out={saved}");
    let words = ["run", &ptx, "--grid", "1", "--block", "32", "--buffer", &buffer, "--buffer", "out=160", "--arg"];
    let (status, out, err) = run(&[&words[..], &["f32:1.5", "--save", &save, "--seeds", "3"]].concat());
    assert_eq!((status, err.as_str()), (cli::CLEAN, ""), "{out}");
    assert!(out.contains("no rule broken by any of 3 seeds"), "{out}");
    assert!(out.contains("32 of 160 bytes of out were never written"), "{out}");
    let data = std::fs::read(saved).expect("the saved buffer");
    let values: Vec<f32> = data.chunks(4).map(|c| f32::from_le_bytes(c.try_into().expect("four"))).collect();
    assert_eq!(values[..4], [0.0, 1.5, 3.0, 4.5]);
    assert_eq!(values.len(), 40);
}

#[test]
fn a_file_is_no_larger_than_other_buffers() {
    let folder = Folder::new("large");
    let ptx = folder.write("scale.ptx", SCALE);
    let large = folder.write("large.bin", []);
    // It takes no space.
    std::fs::File::create(&large).and_then(|file| file.set_len((4 << 30) + 1)).expect("a sparse file");
    let buffer = format!("in=@{large}");
    let words =
        ["run", &ptx, "--grid", "1", "--block", "32", "--buffer", &buffer, "--buffer", "out=128", "--arg", "f32:2"];
    let (status, _, err) = run(&words);
    std::fs::remove_file(&large).expect("it was there");
    assert_eq!(status, cli::USAGE);
    assert!(err.contains("large.bin: more than 4294967296 bytes"), "{err}");
}

#[test]
fn a_broken_rule_is_status_1_with_its_report() {
    let folder = Folder::new("report");
    let ptx = folder.write("scale.ptx", SCALE);
    let words = ["run", &ptx, "--grid", "1", "--block", "64", "--buffer", "in=zero:128", "--buffer", "out=1K"];
    let (status, out, _) = run(&[&words[..], &["--arg", "f32:2"]].concat());
    assert_eq!(status, cli::BROKEN);
    assert!(out.contains("OutOfBounds in scale") && out.contains("ld.global.f32") && out.contains("seed 1"), "{out}");
    let (status, out, _) = run(&[&words[..], &["--arg", "f32:2", "--json", "--seed", "7"]].concat());
    assert_eq!(status, cli::BROKEN);
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["report"]["rule"], "OutOfBounds");
    assert_eq!(json["report"]["site"]["warp"], 1);
    assert_eq!(json["seed"], 7);
    assert!(json["counters"].is_null());
}

#[test]
fn kernels_are_listed_with_what_is_missing() {
    let folder = Folder::new("list");
    let broken = SCALE.replace("mul.f32", "mul.unknown.f32").replace("st.global.f32", "st.nowhere.f32");
    let ptx = folder.write(
        "both.ptx",
        format!(
            "{SCALE}\n{}",
            broken.replace(".version 8.0\n.target sm_80\n.address_size 64\n", "").replace("scale", "other")
        ),
    );
    let (status, out, _) = run(&["list", &ptx]);
    assert_eq!(status, cli::CLEAN);
    assert!(out.contains("scale (20 bytes of parameters)"), "{out}");
    assert!(out.contains("4 bytes at   16  by"), "{out}");
    assert!(out.contains("PTX line 36: `mul.unknown.f32 %f3, %f1, %f2` is not implemented"), "{out}");
    assert!(out.contains("PTX line 37: `st.nowhere.f32"), "{out}");
    let (_, out, _) = run(&["list", &ptx, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["target"], "sm_80");
    assert_eq!(json["kernels"][0]["not_implemented"].as_array().map(Vec::len), Some(2));
    assert_eq!(json["kernels"][1]["parameters"][1]["name"], "out");
}

#[test]
fn what_is_wrong_with_a_command_is_said() {
    let folder = Folder::new("usage");
    let ptx = folder.write("scale.ptx", SCALE);
    let start = ["run", ptx.as_str(), "--grid", "1", "--block", "32"];
    let cases: &[(&[&str], &str)] = &[
        (&["--arg", "u32:1"], "1 values for the 3 parameters in, out, by"),
        (&["--arg", "u32:x"], "`x` is not a value of type u32"),
        (&["--arg", "b32:1"], "`b32` is not a type of --arg"),
        (&["--arg", "7"], "`7` is not TYPE:VALUE"),
        (&["--arg", "bytes:123"], "`123` is not a value of type bytes"),
        (&["--buffer", "in"], "`in` is not NAME=SIZE"),
        (&["--buffer", "in=99999999M"], "is not a size up to"),
        (&["--arg", "u32:1", "--buffer", "o=8", "--arg", "f32:1"], "4 bytes for parameter in, expected 8"),
        (&["--arg", "ptr:x", "--buffer", "o=8", "--arg", "f32:1"], "no --buffer x before --arg ptr:x"),
        (&["--buffer", "i=@nowhere", "--buffer", "o=8", "--arg", "f32:1"], "nowhere"),
        (&["--kernel", "nowhere"], "no kernel nowhere, expected one of scale"),
        (&["--copies", "late"], "`late` is not eager, lazy or mixed"),
        (&["--grid", "1,2,3,4"], "more than three axes"),
        (&["--seeds", "0", "--buffer", "i=8", "--buffer", "o=8", "--arg", "f32:1"], "--seeds must be 1 or more"),
        (&["--frobnicate"], "--frobnicate"),
    ];
    for (words, message) in cases {
        let (status, out, err) = run(&[&start[..], words].concat());
        assert_eq!((status, out.as_str()), (cli::USAGE, ""), "{words:?}");
        assert!(err.contains(message), "{words:?}: {err}");
    }
    for (words, message) in [
        (&["run", ptx.as_str()][..], "--grid and --block are needed"),
        (&["run"], "a PTX file is missing"),
        (&[], "a command is missing"),
        (&["walk", "x"], "`walk x` is not understood"),
        (&["list", "nowhere.ptx"], "nowhere.ptx"),
    ] {
        let (status, _, err) = run(words);
        assert_eq!(status, cli::USAGE);
        assert!(err.contains(message), "{words:?}: {err}");
    }
    assert_eq!(run(&["--help"]).0, cli::CLEAN);
}
