//! Compiles every `kernels/<family>/*.cu` to one fatbin (and to PTX for the emulator), binds `kernels/params.h`, and
//! writes the table of images that `src/kernels.rs` includes. Without the `cuda` feature there is nothing to do.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DOCS_RS");
    #[cfg(feature = "cuda")]
    if std::env::var_os("DOCS_RS").is_some() {
        // docs.rs has no nvcc: the crate documents itself with an empty table of images.
        println!("cargo:rustc-cfg=fused_lora_no_kernels");
    } else if let Err(message) = cuda::build() {
        eprintln!("\nfused-lora: {message}\n");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::fmt::Write as _;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Overrides the architectures: `80,90,120+PTX` (machine code for each; `+PTX` adds PTX of that one).
    const ARCHS_VARIABLE: &str = "FUSED_LORA_CUDA_ARCHS";
    /// Machine code runs on later minor versions of the same major one, so these cover all that nvcc 13 lists.
    const DEFAULT_SASS: &[u32] = &[75, 80, 86, 89, 90, 100, 120];
    /// PTX in the fatbin, for GPUs to come.
    const DEFAULT_PTX: &[u32] = &[80];
    /// PTX that the feature `emulator` runs: with and without cp.async and bf16 tensor instructions.
    const EMULATED: &[u32] = &[75, 80];

    type Result<T> = std::result::Result<T, String>;

    struct Archs {
        sass: Vec<u32>,
        ptx: Vec<u32>,
    }

    pub fn build() -> Result<()> {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "LIBCLANG_PATH", ARCHS_VARIABLE] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        // The folder as a whole: a header that changes must rebuild every image.
        println!("cargo:rerun-if-changed=kernels");
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
        let nvcc = find_nvcc()?;
        // SAFETY: the build script has started no other thread yet.
        unsafe { env::set_var("NVCC", &nvcc) }; // the only way to tell the cc crate which nvcc to use
        // For the tests that compile kernels with defects.
        println!("cargo:rustc-env=FUSED_LORA_NVCC={}", nvcc.display());
        let archs = Archs::choose(&nvcc)?;
        bind_params(&out)?;
        let sources = sources()?;
        let images = std::thread::scope(|scope| {
            let workers: Vec<_> =
                sources.iter().map(|source| scope.spawn(|| compile(source, &nvcc, &archs, &out))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|_| Err("a compiler thread panicked".to_owned())))
                .collect::<Result<Vec<String>>>()
        })?;
        let table =
            format!("/// Every image of this build.\npub static IMAGES: &[Image] = &[\n{}];\n", images.concat());
        write(&out.join("kernels.rs"), &table)
    }

    fn write(path: &Path, text: &str) -> Result<()> {
        fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
    }

    /// The release of an nvcc, from the line `Cuda compilation tools, release 13.0, V13.0.88`.
    fn release(nvcc: &Path) -> Option<(u32, u32)> {
        let output = Command::new(nvcc).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (_, release) = text.split_once("release ")?;
        let (major, rest) = release.split_once('.')?;
        let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// NVCC, then CUDA_HOME and CUDA_PATH, then PATH, then /usr/local/cuda: the first of CUDA 12 or later. What NVCC names is
    /// used or refused, never passed over.
    fn find_nvcc() -> Result<PathBuf> {
        let exe = format!("nvcc{}", env::consts::EXE_SUFFIX);
        let mut candidates: Vec<(&str, PathBuf)> = Vec::new();
        if let Some(nvcc) = env::var_os("NVCC") {
            candidates.push(("NVCC", PathBuf::from(nvcc)));
        }
        for variable in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(home) = env::var_os(variable) {
                candidates.push((variable, Path::new(&home).join("bin").join(&exe)));
            }
        }
        if let Some(path) = env::var_os("PATH") {
            candidates.extend(env::split_paths(&path).map(|folder| ("PATH", folder.join(&exe))));
        }
        candidates.push(("default", Path::new("/usr/local/cuda/bin").join(&exe)));
        let mut looked = Vec::new();
        for (origin, path) in &candidates {
            let verdict = match path.is_file().then(|| release(path)) {
                Some(Some((12.., _))) => {
                    if *origin == "PATH" || *origin == "default" {
                        // Another PATH could lead elsewhere; with the variables above it does not matter.
                        println!("cargo:rerun-if-env-changed=PATH");
                    }
                    return Ok(path.clone());
                }
                Some(Some((major, minor))) => format!("is of CUDA {major}.{minor}"),
                Some(None) => "does not say its release".to_owned(),
                None => "does not exist".to_owned(),
            };
            if *origin == "NVCC" {
                return Err(format!(
                    "the variable NVCC names {}, which {verdict}; expected nvcc of CUDA 12 or later",
                    path.display()
                ));
            }
            if *origin != "PATH" || path.is_file() {
                looked.push(format!("    {} ({origin}), which {verdict}", path.display()));
            }
        }
        println!("cargo:rerun-if-env-changed=PATH");
        Err(format!(
            "the feature `cuda` needs nvcc (CUDA 12 or later), and none was found. Looked for\n{}\n    {exe} in every \
             folder of PATH\nThree ways out:\n  1. install the CUDA toolkit, and set CUDA_HOME if it is not in a usual \
             place;\n  2. in a checkout of this project, run `make toolchain` (puts nvcc and libclang into .toolchain/) \
             and then\n     `. .toolchain/env`;\n  3. build the CPU backend alone with `--no-default-features`.",
            looked.join("\n")
        ))
    }

    impl Archs {
        fn choose(nvcc: &Path) -> Result<Archs> {
            if let Ok(list) = env::var(ARCHS_VARIABLE) {
                return Archs::parse(&list);
            }
            let output = Command::new(nvcc)
                .arg("--list-gpu-code")
                .output()
                .map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
            let listed = String::from_utf8_lossy(&output.stdout);
            let listed: Vec<&str> = listed.split_whitespace().collect();
            let sass: Vec<u32> =
                DEFAULT_SASS.iter().copied().filter(|arch| listed.contains(&format!("sm_{arch}").as_str())).collect();
            if sass.is_empty() {
                return Err(format!(
                    "{} lists none of the architectures {DEFAULT_SASS:?}; it says: {}",
                    nvcc.display(),
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
            }
            Ok(Archs { sass, ptx: DEFAULT_PTX.to_vec() })
        }

        fn parse(list: &str) -> Result<Archs> {
            let mut archs = Archs { sass: Vec::new(), ptx: Vec::new() };
            for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
                let number = item.strip_suffix("+PTX").unwrap_or(item);
                let arch: u32 = number.parse().ok().filter(|arch| (75..1000).contains(arch)).ok_or_else(|| {
                    format!("{ARCHS_VARIABLE} contains `{item}`, expected numbers from 75 on such as `80,90,120+PTX`")
                })?;
                archs.sass.push(arch);
                if number != item {
                    archs.ptx.push(arch);
                }
            }
            if archs.sass.is_empty() {
                return Err(format!("{ARCHS_VARIABLE} is empty, expected architectures such as `80,90,120+PTX`"));
            }
            Ok(archs)
        }
    }

    /// `(family, file)` of every kernel source.
    fn sources() -> Result<Vec<PathBuf>> {
        let list = |folder: &Path| -> Result<Vec<PathBuf>> {
            let entries = fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
            let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            Ok(paths)
        };
        let mut sources = Vec::new();
        for family in list(Path::new("kernels"))?.iter().filter(|path| path.is_dir()) {
            sources.extend(list(family)?.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "cu")));
        }
        Ok(sources)
    }

    fn stem(path: &Path) -> String {
        path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Compiles one source and returns its row of the table.
    fn compile(source: &Path, nvcc: &Path, archs: &Archs, out: &Path) -> Result<String> {
        let name = format!("{}_{}", source.parent().map(stem).unwrap_or_default(), stem(source));
        let fatbin = compile_fatbin(source, archs, &out.join(&name))?;
        let mut ptx = String::new();
        let emulated = if env::var_os("CARGO_FEATURE_EMULATOR").is_some() { EMULATED } else { &[] };
        for arch in emulated {
            let path = out.join(format!("{name}.compute_{arch}.ptx"));
            let output = Command::new(nvcc)
                .args(["-std=c++17", "-O3", "-lineinfo", "-ptx"])
                .arg(format!("-arch=compute_{arch}"))
                .arg("-o")
                .arg(&path)
                .arg(source)
                .output()
                .map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
            if !output.status.success() {
                return Err(format!(
                    "nvcc failed on {}:\n{}",
                    source.display(),
                    String::from_utf8_lossy(&output.stderr)
                ));
            }
            let _ = write!(ptx, "({arch}, include_str!({path:?})), ");
        }
        Ok(format!(
            "    Image {{ name: {name:?}, fatbin: include_bytes!({fatbin:?}), ptx: &[{ptx}], sass: &{:?}, ptx_archs: &{:?} }},\n",
            archs.sass, archs.ptx
        ))
    }

    fn compile_fatbin(source: &Path, archs: &Archs, folder: &Path) -> Result<PathBuf> {
        let mut build = cc::Build::new();
        build
            .cuda(true)
            .cudart("none")
            .debug(false) // cc would add -G in the dev profile, which switches device optimisation off
            .opt_level(3)
            .cargo_metadata(false)
            .cargo_warnings(true)
            .out_dir(folder)
            .flag("-std=c++17") // Build::std reaches the host compiler only
            .flag("--fatbin")
            .file(source);
        for arch in &archs.sass {
            build.flag(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        for arch in &archs.ptx {
            build.flag(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
        }
        let objects = build
            .try_compile_intermediates()
            .map_err(|error| format!("nvcc failed on {}: {error}", source.display()))?;
        let object = objects.first().ok_or("nvcc produced no output")?;
        let fatbin = folder.with_extension("fatbin");
        fs::copy(object, &fatbin).map_err(|error| format!("cannot copy {}: {error}", object.display()))?;
        Ok(fatbin)
    }

    fn bind_params(out: &Path) -> Result<()> {
        // bindgen panics when it cannot load libclang; the panic is turned into our message.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let bindings = std::panic::catch_unwind(|| {
            bindgen::Builder::default()
                .header("kernels/params.h")
                .allowlist_type("Lora.*")
                .allowlist_var("LORA_.*")
                .use_core()
                .generate()
        });
        std::panic::set_hook(hook);
        let bindings = bindings
            .map_err(|_| {
                let named = env::var("LIBCLANG_PATH").map(|path| format!(" = {path}")).unwrap_or_default();
                format!("the feature `cuda` binds kernels/params.h with bindgen, which needs libclang, and none was found \
                 (LIBCLANG_PATH{named}, llvm-config, the usual library folders).\nThree ways out:\n  1. install libclang \
                 (Debian: `apt-get install libclang-dev`), or set LIBCLANG_PATH to the folder that holds it;\n  2. in a \
                 checkout of this project, run `make toolchain` and then `. .toolchain/env`;\n  3. build the CPU \
                 backend alone with `--no-default-features`.")
            })?
            .map_err(|error| format!("bindgen failed on kernels/params.h: {error}"))?;
        let path = out.join("params.rs");
        bindings.write_to_file(&path).map_err(|error| format!("cannot write {}: {error}", path.display()))
    }
}
