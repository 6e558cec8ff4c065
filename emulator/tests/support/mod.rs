//! Runs a kernel of the Hopper tests: `k(map, in, out)` with a tile, mbarriers and registers at hand.

#![allow(dead_code, reason = "each test file uses its part")]

use ptx_emulator::{Checks, Counters, Device, Launch, Memory, Module, Options, Report, Rule, TensorMap, Timing};

pub const SEEDS: u64 = 20;

/// `%t`, `%c`, `%k`: thread, CTA, rank in the cluster; `%tile`, `%bar`: shared addresses; `%map`: the tensor map.
pub fn module(body: &str) -> Module {
    let text = format!(
        "
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 in, .param .u64 out)
{{
    .shared .align 1024 .b8 tile[8192];
    .shared .align 8 .b64 bars[8];
    .reg .pred %p<8>;
    .reg .b16 %h<4>;
    .reg .b32 %t, %c, %k, %tile, %bar, %r<32>;
    .reg .b64 %in, %out, %map, %rd<24>;
    mov.b64 %map, map;
    cvta.param.u64 %map, %map;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %c, %ctaid.x;
    mov.u32 %k, %cluster_ctarank;
    mov.u32 %tile, tile;
    mov.u32 %bar, bars;
{body}
}}
"
    );
    Module::parse(&text).expect("the kernel parses")
}

/// A launch; `map` makes the tensor map from the addresses of `in` and `out`.
pub struct Run {
    pub ctas: u32,
    pub cluster: u32,
    pub threads: u32,
    pub input: Vec<u8>,
    pub out_bytes: usize,
    pub map: fn(u64, u64) -> Option<TensorMap>,
    pub fence_reads: bool,
    pub races: bool,
}

/// One warp, `in` of 8 KiB that counts in 16-bit words, `out` of as much.
pub fn one_warp() -> Run {
    Run {
        ctas: 1,
        cluster: 1,
        threads: 32,
        input: (0..4096u16).flat_map(u16::to_le_bytes).collect(),
        out_bytes: 8192,
        map: |_, _| None,
        fence_reads: false,
        races: true,
    }
}

pub fn warps(count: u32) -> Run {
    Run { threads: 32 * count, ..one_warp() }
}

/// Clusters of two CTAs of two warps.
pub fn pair() -> Run {
    Run { ctas: 2, cluster: 2, threads: 64, ..one_warp() }
}

impl Run {
    /// What `out` holds afterwards; bytes that were not written are 0xee.
    pub fn run(&self, module: &Module, seed: u64) -> Result<(Vec<u8>, Counters), Box<Report>> {
        let mut memory = Memory::new();
        let input = memory.alloc("in", self.input.len());
        let output = memory.alloc("out", self.out_bytes);
        memory.write(input, &self.input).expect("in range");
        let mut params = vec![0; 128];
        if let Some(map) = (self.map)(input, output) {
            params.copy_from_slice(map.as_bytes());
        }
        params.extend([input, output].into_iter().flat_map(u64::to_le_bytes));
        let launch = Launch {
            kernel: "k",
            grid: [self.ctas, 1, 1],
            cluster: [self.cluster, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: 0,
            params: &params,
        };
        let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
        let device = Device { ctas_per_cluster: 16, ..Device::hopper() };
        let fence_reads = self.fence_reads;
        let checks = Checks { races: self.races, ..Checks::default() };
        let options = Options { seed, copies, device, checks, fence_reads, patience: 20_000, ..Options::default() };
        let counters = module.launch(&mut memory, &launch, &options)?;
        let written = memory.written(output, self.out_bytes).expect("in range");
        let mut out = vec![0xee; self.out_bytes];
        for (at, _) in written.iter().enumerate().filter(|(_, written)| **written) {
            out[at] = memory.read(output + at as u64, 1).expect("written")[0];
        }
        Ok((out, counters))
    }

    /// Passes for every seed with the same `out`, which is returned.
    #[track_caller]
    pub fn passes(&self, body: &str) -> Vec<u8> {
        let module = module(body);
        assert_eq!(module.kernel_error("k"), None);
        let mut first = None;
        for seed in 1..=SEEDS {
            let outcome = self.run(&module, seed);
            assert_eq!(outcome.as_ref().err().map(ToString::to_string), None, "seed {seed}");
            let same = outcome.is_ok_and(|(out, _)| *first.get_or_insert_with(|| out.clone()) == out);
            assert!(same, "seed {seed}: another result");
        }
        first.expect("a run")
    }

    /// As 32-bit words.
    #[track_caller]
    pub fn words(&self, body: &str) -> Vec<u32> {
        words(&self.passes(body))
    }

    /// Reported for every seed, under one of these rules, with these words in the report.
    #[track_caller]
    pub fn reports(&self, body: &str, rules: &[Rule], says: &str) {
        let module = module(body);
        assert_eq!(module.kernel_error("k"), None);
        for seed in 1..=SEEDS {
            let outcome = self.run(&module, seed);
            assert!(outcome.is_err(), "seed {seed}: expected {rules:?}, but it passes:\n{body}");
            let report = outcome.expect_err("checked");
            assert!(rules.contains(&report.rule), "seed {seed}: expected {rules:?}: {report}");
            assert!(report.to_string().contains(says), "seed {seed}: expected `{says}` in: {report}");
        }
    }

    /// Whether a wait without its loop is noticed depends on who comes first; at least a quarter of the seeds must show it.
    #[track_caller]
    pub fn reports_some(&self, body: &str, rules: &[Rule]) {
        let module = module(body);
        let found = (1..=SEEDS).filter(|seed| match self.run(&module, *seed) {
            Err(report) => {
                assert!(rules.contains(&report.rule), "seed {seed}: expected {rules:?}: {report}");
                true
            }
            Ok(_) => false,
        });
        let found = found.count() as u64;
        assert!(4 * found >= SEEDS, "only {found} of {SEEDS}");
    }

    /// Deletes each synchronising instruction in turn. All but the `redundant` ones, given by their beginnings, are noticed by
    /// some seed.
    #[track_caller]
    pub fn notices_removals(&self, body: &str, redundant: &[&str]) {
        let lines: Vec<&str> = body.lines().collect();
        let synchronises = |line: &str| {
            let instruction = line.trim().trim_start_matches(|c: char| c != ' ' && line.trim().starts_with('@')).trim();
            ["bar", "fence", "mbarrier.", "cp.async.bulk.commit", "cp.async.bulk.wait"]
                .iter()
                .any(|start| instruction.starts_with(start))
        };
        assert!(lines.iter().filter(|line| synchronises(line)).count() >= 3);
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| synchronises(line)) {
            let without: Vec<&str> =
                lines.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, line)| *line).collect();
            let module = module(&without.join("\n"));
            let found = (1..=SEEDS).filter(|seed| self.run(&module, *seed).is_err()).count();
            let expected = !redundant.iter().any(|start| line.trim().starts_with(start));
            assert_eq!(found != 0, expected, "{found} of {SEEDS} without `{line}` (line {at})");
        }
    }

    /// `body` passes; each `(old, new)` breaks it.
    #[track_caller]
    pub fn twins(&self, body: &str, broken: &[(&str, &str, &[Rule], &str)]) -> Vec<u8> {
        let out = self.passes(body);
        for (old, new, rules, says) in broken {
            assert!(body.contains(old), "`{old}` is not in the kernel");
            self.reports(&body.replacen(old, new, 1), rules, says);
        }
        out
    }
}

pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}
