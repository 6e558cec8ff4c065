//! Kernels in pairs: one that is correct, and the same with one thing broken.
#![allow(dead_code, reason = "each test binary uses a part")]

use ptx_emulator::{Checks, Counters, Launch, Memory, Module, Options, Report, Rule, Timing};

pub const SEEDS: u64 = 20;

/// A kernel `k` with two pointers; registers, 1024 bytes of shared memory and `%t` = thread are at hand.
pub fn module(body: &str) -> Module {
    let text = format!(
        "
.version 8.0
.target sm_80
.address_size 64
.shared .align 16 .b8 tile[1024];
.visible .entry k(.param .u64 in, .param .u64 out)
{{
    .reg .pred %p<4>;
    .reg .b32 %t, %c, %r<16>;
    .reg .b64 %in, %out, %rd<8>;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %c, %ctaid.x;
{body}
}}
"
    );
    Module::parse(&text).expect("the kernel parses")
}

pub struct Run {
    pub ctas: u32,
    pub threads: u32,
    /// Bytes of `in`, all initialised, and of `out`, not initialised.
    pub bytes: (usize, usize),
}

pub const ONE_WARP: Run = Run { ctas: 1, threads: 32, bytes: (4096, 4096) };
pub const TWO_WARPS: Run = Run { threads: 64, ..ONE_WARP };
pub const TWO_CTAS: Run = Run { ctas: 2, ..ONE_WARP };

impl Run {
    pub fn with_seed(&self, module: &Module, seed: u64) -> Result<Counters, Box<Report>> {
        let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
        self.with_options(module, &Options { seed, copies, patience: 20_000, ..Options::default() })
    }

    pub fn counted(&self, body: &str) -> Counters {
        let checks = Checks { counters: true, ..Checks::default() };
        self.with_options(&module(body), &Options { checks, ..Options::default() }).expect("the kernel is correct")
    }

    pub fn with_options(&self, module: &Module, options: &Options) -> Result<Counters, Box<Report>> {
        let mut memory = Memory::new();
        let input = memory.alloc("in", self.bytes.0);
        let output = memory.alloc("out", self.bytes.1);
        memory.write(input, &vec![0; self.bytes.0]).expect("in range");
        let params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
        let launch = Launch {
            kernel: "k",
            grid: [self.ctas, 1, 1],
            cluster: [1, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: 0,
            params: &params,
        };
        module.launch(&mut memory, &launch, options)
    }

    /// The broken kernel is reported under `rule` at the instruction `at`, for every seed.
    #[track_caller]
    pub fn reports(&self, broken: &str, rule: Rule, at: &str) {
        let module = module(broken);
        for seed in 1..=SEEDS {
            let result = self.with_seed(&module, seed);
            assert!(result.is_err(), "seed {seed}: nothing is reported, expected {rule:?} at `{at}` in{broken}");
            let report = result.expect_err("the kernel is broken");
            assert_eq!(report.rule, rule, "seed {seed}: {report}");
            let text = report.to_string();
            assert!(text.contains(at), "seed {seed}: expected `{at}` in: {text}");
        }
    }

    #[track_caller]
    pub fn passes(&self, correct: &str) {
        let module = module(correct);
        for seed in 1..=SEEDS {
            let report = self.with_seed(&module, seed).err().map(|report| report.to_string());
            assert_eq!(report, None, "seed {seed}");
        }
    }

    /// `correct` passes; each `(old, new)` breaks it.
    #[track_caller]
    pub fn twins(&self, correct: &str, broken: &[(&str, &str, Rule, &str)]) {
        self.passes(correct);
        for (old, new, rule, at) in broken {
            assert!(correct.contains(old), "`{old}` is not in the kernel");
            self.reports(&correct.replacen(old, new, 1), *rule, at);
        }
    }
}
