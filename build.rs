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
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Overrides the architectures: `80,90,120+PTX` (machine code for each; `+PTX` adds PTX of that one). 90 brings the
    /// Hopper kernels along; `90a` is another way to write it.
    const ARCHS_VARIABLE: &str = "FUSED_LORA_CUDA_ARCHS";
    /// Machine code runs on later minor versions of the same major one, so these cover all that nvcc 13 lists.
    const DEFAULT_SASS: &[u32] = &[75, 80, 86, 89, 90, 100, 120];
    /// PTX in the fatbin, for GPUs to come.
    const DEFAULT_PTX: &[u32] = &[80];
    /// PTX that the feature `emulator` runs: with and without cp.async and bf16 tensor instructions.
    const EMULATED: &[u32] = &[75, 80];
    /// The family, and the one architecture, of kernels that use what later architectures do not have. Their target is
    /// `sm_90a`, and their PTX is never embedded: no later GPU could run it.
    const SPECIFIC: (&str, u32) = ("sm90", 90);
    /// What ptxas says when wgmma waits for each instruction: such kernels are right, and take a multiple of the time. As
    /// registers in local memory it is a warning here, because which nvcc comes to that is not known for all, and a failure of
    /// `scripts/kernel-bars`, which finds these lines in `<image>.remarks`.
    const SLOW_REMARKS: &[&str] = &["C7508", "C7510", "C7511", "C7515", "Potential Performance Loss"];

    /// Flags that nvcc adds to those it is called with, its host compiler, and where that looks for headers.
    const NVCC_VARIABLES: &[&str] =
        &["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH"];

    type Result<T> = std::result::Result<T, String>;

    struct Archs {
        sass: Vec<u32>,
        ptx: Vec<u32>,
    }

    pub fn build() -> Result<()> {
        let variables = ["NVCC", "CUDA_HOME", "CUDA_PATH", "LIBCLANG_PATH", ARCHS_VARIABLE];
        for variable in variables.iter().chain(NVCC_VARIABLES) {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        // The folder as a whole: a header that changes must rebuild every image.
        println!("cargo:rerun-if-changed=kernels");
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
        let nvcc = find_nvcc()?;
        // SAFETY: the build script has started no other thread yet.
        unsafe { env::set_var("NVCC", &nvcc) }; // the only way to tell the cc crate which nvcc to use
        if let Some((major, minor)) = release(&nvcc) {
            println!("cargo:rustc-env=FUSED_LORA_NVCC_RELEASE={major}.{minor}"); // for whoever says what was measured
        }
        // For the tests that compile kernels with defects.
        println!("cargo:rustc-env=FUSED_LORA_NVCC={}", nvcc.display());
        let archs = Archs::choose(&nvcc)?;
        bind_params(&out)?;
        let sources = sources()?;
        let kept = Kept::new(&nvcc, &out)?;
        let images = std::thread::scope(|scope| {
            let workers: Vec<_> =
                sources.iter().map(|source| scope.spawn(|| compile(source, &nvcc, &archs, &kept, &out))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|_| Err("a compiler thread panicked".to_owned())))
                .collect::<Result<Vec<Option<String>>>>()
        })?;
        let images: Vec<String> = images.into_iter().flatten().collect();
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
                // The Hopper kernels are built for it whenever 90 is in the list.
                let number = if number == "90a" { "90" } else { number };
                let arch: u32 = number.parse().ok().filter(|arch| (75..1000).contains(arch)).ok_or_else(|| {
                    format!("{ARCHS_VARIABLE} contains `{item}`, expected numbers from 75 on such as `80,90,120+PTX`")
                })?;
                if !archs.sass.contains(&arch) {
                    archs.sass.push(arch);
                }
                if item.ends_with("+PTX") {
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

    /// What to compile one source for.
    struct Targets {
        /// Machine code and PTX in the fatbin.
        sass: Vec<u32>,
        ptx: Vec<u32>,
        /// PTX for the emulator.
        emulated: Vec<u32>,
        /// The targets are `compute_90a` and the like.
        is_specific: bool,
    }

    impl Targets {
        fn of(source: &Path, archs: &Archs) -> Targets {
            let has_emulator = env::var_os("CARGO_FEATURE_EMULATOR").is_some();
            let (family, arch) = SPECIFIC;
            let is_specific = source.parent().map(stem).is_some_and(|folder| folder == family);
            let (sass, ptx, emulated) = if is_specific {
                (archs.sass.iter().copied().filter(|&listed| listed == arch).collect(), Vec::new(), vec![arch])
            } else {
                (archs.sass.clone(), archs.ptx.clone(), EMULATED.to_vec())
            };
            Targets { sass, ptx, emulated: if has_emulator { emulated } else { Vec::new() }, is_specific }
        }

        fn name(&self, prefix: &str, arch: u32) -> String {
            format!("{prefix}_{arch}{}", if self.is_specific { "a" } else { "" })
        }
    }

    /// Compiles one source and returns its row of the table; none when this build has no use for it.
    fn compile(source: &Path, nvcc: &Path, archs: &Archs, kept: &Kept, out: &Path) -> Result<Option<String>> {
        let name = format!("{}_{}", source.parent().map(stem).unwrap_or_default(), stem(source));
        let targets = Targets::of(source, archs);
        let mut ptx = String::new();
        for &arch in &targets.emulated {
            let path = out.join(format!("{name}.{}.ptx", targets.name("compute", arch)));
            let mut command = Command::new(nvcc);
            command
                .args(["-std=c++17", "-O3", "-lineinfo", "-ptx"])
                .arg(format!("-arch={}", targets.name("compute", arch)));
            kept.make(&path, command, source)?;
            let _ = write!(ptx, "({arch}, include_str!({path:?})), ");
        }
        let fatbin = out.join(format!("{name}.fatbin"));
        if targets.sass.is_empty() {
            // What an earlier build for other architectures left must not be taken for this one's.
            let _ = fs::remove_file(&fatbin);
        } else {
            let said = kept.make(&fatbin, fatbin_command(nvcc, &targets)?, source)?;
            let is_slow = |line: &&str| SLOW_REMARKS.iter().any(|remark| line.contains(remark));
            let remarks: Vec<&str> = said.lines().filter(is_slow).collect();
            remarks.iter().for_each(|line| println!("cargo:warning={line}"));
            write(&out.join(format!("{name}.remarks")), &remarks.join("\n"))?;
        }
        let embedded = match (targets.sass.is_empty(), ptx.is_empty()) {
            (true, true) => return Ok(None),
            (true, false) => "&[]".to_owned(),
            (false, _) => format!("include_bytes!({fatbin:?})"),
        };
        Ok(Some(format!(
            "    Image {{ name: {name:?}, fatbin: {embedded}, ptx: &[{ptx}], sass: &{:?}, ptx_archs: &{:?}, \
             is_specific: {} }},\n",
            targets.sass, targets.ptx, targets.is_specific
        )))
    }

    /// What nvcc made before, kept beside the profiles of the target folder: features and profiles change nothing about a
    /// kernel, and compiling all of them takes minutes.
    struct Kept {
        folder: PathBuf,
        /// What it says of its version.
        nvcc: Vec<u8>,
    }

    impl Kept {
        fn new(nvcc: &Path, out: &Path) -> Result<Kept> {
            let version = Command::new(nvcc).arg("--version").output();
            let nvcc = version.map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?.stdout;
            // OUT_DIR is <target>/<profile>/build/<package>/out.
            let target = out.ancestors().nth(4).unwrap_or(out);
            Ok(Kept { folder: target.join("fused-lora-kernels"), nvcc })
        }

        /// Of nvcc's version, its variables, and everything that a source may include: all of `kernels` but the folders of the
        /// other families, so that altering one compiles no other.
        fn digest(&self, source: &Path) -> Result<u64> {
            fn add(folder: &Path, other: &dyn Fn(&Path) -> bool, hasher: &mut DefaultHasher) -> std::io::Result<()> {
                let mut paths: Vec<PathBuf> =
                    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
                paths.sort();
                for path in paths.iter().filter(|path| !other(path)) {
                    path.hash(hasher);
                    if path.is_dir() { add(path, other, hasher)? } else { fs::read(path)?.hash(hasher) }
                }
                Ok(())
            }
            let is_family = |path: &Path| path.join("forward.cu").is_file();
            let other = |path: &Path| is_family(path) && source.parent() != Some(path);
            let mut hasher = DefaultHasher::new();
            self.nvcc.hash(&mut hasher);
            add(Path::new("kernels"), &other, &mut hasher).map_err(|error| format!("cannot read kernels: {error}"))?;
            NVCC_VARIABLES
                .iter()
                .filter_map(|name| Some((name, env::var_os(name)?)))
                .for_each(|set| set.hash(&mut hasher));
            Ok(hasher.finish())
        }

        /// Makes `path` from `source` by nvcc, or takes what the same command made before; returns what nvcc said, of which
        /// warnings are passed on.
        fn make(&self, path: &Path, mut command: Command, source: &Path) -> Result<String> {
            let digest = self.digest(source)?;
            let mut hasher = DefaultHasher::new();
            (digest, command.get_program(), source).hash(&mut hasher);
            command.get_args().for_each(|arg| arg.hash(&mut hasher));
            // Line information names the sources by their full paths, which tests follow: other checkouts have their own.
            if command.get_args().any(|arg| arg == "-lineinfo") {
                env::current_dir().ok().hash(&mut hasher);
            }
            let kept = self.folder.join(format!("{:016x}", hasher.finish()));
            let kept_said = kept.with_extension("said");
            let said = match fs::read_to_string(&kept_said) {
                Ok(said) if fs::copy(&kept, path).is_ok() => said,
                _ => {
                    let said = run(command.arg("-o").arg(path).arg(source), source)?;
                    // What was edited meanwhile may be in there, under the name of what it was before.
                    if self.digest(source)? == digest {
                        let partial = self.folder.join(format!("{:016x}.{}", hasher.finish(), std::process::id()));
                        // Under its name only when complete and on the disk, what was said last. That nothing can be kept
                        // is no error.
                        let _ = fs::create_dir_all(&self.folder)
                            .and_then(|()| fs::copy(path, &partial))
                            .and_then(|_| fs::File::open(&partial)?.sync_all())
                            .and_then(|()| fs::rename(&partial, &kept))
                            .and_then(|()| fs::write(&partial, &said))
                            .and_then(|()| fs::rename(&partial, &kept_said));
                    }
                    said
                }
            };
            for line in said.lines().filter(|line| line.contains("warning")) {
                println!("cargo:warning={line}");
            }
            Ok(said)
        }
    }

    /// Runs nvcc and returns what it said.
    fn run(command: &mut Command, source: &Path) -> Result<String> {
        let output =
            command.output().map_err(|error| format!("cannot run {}: {error}", command.get_program().display()))?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(said) } else { Err(format!("nvcc failed on {}:\n{said}", source.display())) }
    }

    fn fatbin_command(nvcc: &Path, targets: &Targets) -> Result<Command> {
        // The cc crate knows how to make nvcc find its host compiler.
        let compiler = cc::Build::new()
            .cuda(true)
            .cudart("none")
            .debug(false) // cc would add -G in the dev profile, which switches device optimisation off
            .opt_level(3)
            .cargo_metadata(false)
            .try_get_compiler()
            .map_err(|error| format!("cannot use {}: {error}", nvcc.display()))?;
        let mut command = compiler.to_command();
        command.args(["-std=c++17", "--fatbin", "--threads", "0"]);
        command.args(["-Xptxas", "--warn-on-local-memory-usage,--warn-on-spills"]);
        for &arch in &targets.sass {
            command.arg(format!("-gencode=arch={},code={}", targets.name("compute", arch), targets.name("sm", arch)));
        }
        for &arch in &targets.ptx {
            command.arg(format!("-gencode=arch={0},code={0}", targets.name("compute", arch)));
        }
        Ok(command)
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
