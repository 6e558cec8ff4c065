//! Instructions of a warp, barriers with reductions, setmaxnreg: what they compute, and what is reported.

#![allow(clippy::panic)] // helpers of tests fail as tests do

use half::f16;
use ptx_emulator::{Launch, Memory, Module, Options, Report, Rule, Timing};

const SEEDS: u64 = 20;

/// A kernel `k` with `%t` = thread, `%v` = the thread's word of `in`, `%in` its address, and `%out` that of its 64 bytes of `out`.
fn module(body: &str) -> Module {
    let text = format!(
        "
.version 8.0
.target sm_90a
.address_size 64
.shared .align 128 .b8 tile[4096];
.visible .entry k(.param .u64 in, .param .u64 out)
{{
    .reg .pred %p<8>;
    .reg .b32 %t, %l, %v, %r<32>;
    .reg .b64 %in, %out, %rd<8>;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %l, %laneid;
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %in, %in, %rd1;
    mul.wide.u32 %rd1, %t, 64;
    add.s64 %out, %out, %rd1;
    ld.global.u32 %v, [%in];
{body}
    ret;
}}
"
    );
    let module = Module::parse(&text).expect("the kernel parses");
    assert_eq!(module.kernel_error("k"), None);
    module
}

/// The first words of each thread's 64 bytes; zero where nothing was written.
fn run(module: &Module, input: &[u32], seed: u64) -> Result<Vec<[u32; 16]>, Box<Report>> {
    let threads = input.len();
    let mut memory = Memory::new();
    let bytes: Vec<u8> = input.iter().flat_map(|word| word.to_le_bytes()).collect();
    let at = memory.alloc("in", bytes.len());
    memory.write(at, &bytes).expect("in range");
    let out = memory.alloc("out", 64 * threads);
    memory.write(out, &vec![0; 64 * threads]).expect("in range");
    let params: Vec<u8> = [at, out].into_iter().flat_map(u64::to_le_bytes).collect();
    let launch = Launch {
        kernel: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [threads as u32, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
    module.launch(&mut memory, &launch, &Options { seed, copies, patience: 20_000, ..Options::default() })?;
    let words = memory.read(out, 64 * threads).expect("in range");
    let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(words.chunks(64).map(|thread| std::array::from_fn(|i| word(&thread[4 * i..]))).collect())
}

fn results(body: &str, input: &[u32]) -> Vec<[u32; 16]> {
    run(&module(body), input, 1).unwrap_or_else(|report| panic!("{report}"))
}

#[track_caller]
fn reports(body: &str, threads: usize, rule: Rule, at: &str) {
    let module = module(body);
    for seed in 1..=SEEDS {
        let report = run(&module, &vec![1; threads], seed).expect_err("the kernel is broken");
        assert_eq!(report.rule, rule, "seed {seed}: {report}");
        let text = report.to_string();
        assert!(text.contains(at), "seed {seed}: expected `{at}` in: {text}");
    }
}

/// The same for every seed.
#[track_caller]
fn always(body: &str, input: &[u32], expected: impl Fn(usize) -> u32) {
    let module = module(body);
    for seed in 1..=SEEDS {
        let found = run(&module, input, seed).unwrap_or_else(|report| panic!("seed {seed}: {report}"));
        for (thread, words) in found.iter().enumerate() {
            assert_eq!(words[0], expected(thread), "thread {thread}, seed {seed}");
        }
    }
}

fn lanes(value: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..32).map(value).collect()
}

/// `stmatrix` of registers whose halves are all different, and what each row in memory holds then.
#[test]
fn stmatrix_stores_the_fragments() {
    for (count, list) in [(1, "{%r4}"), (2, "{%r4, %r5}"), (4, "{%r4, %r5, %r6, %r7}")] {
        for trans in [false, true] {
            for space in [".shared", ".shared::cta", ""] {
                let address = if space.is_empty() { "%rd3" } else { "%r3" };
                let body = format!(
                    "
    mov.u32 %r2, tile;
    shl.b32 %r3, %l, 5;
    add.s32 %r3, %r3, %r2;
    cvt.u64.u32 %rd2, %r3;
    cvta.shared.u64 %rd3, %rd2;
    mov.u32 %r4, %v;
    add.s32 %r5, %v, 0x01000100;
    add.s32 %r6, %v, 0x02000200;
    add.s32 %r7, %v, 0x03000300;
    stmatrix.sync.aligned.m8n8.x{count}{}{space}.b16 [{address}], {list};
    setp.ge.u32 %p1, %l, {};
    @%p1 ret;
    ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%r3];
    st.global.v4.u32 [%out], {{%r8, %r9, %r10, %r11}};",
                    if trans { ".trans" } else { "" },
                    8 * count,
                );
                let found = results(&body, &lanes(|lane| (2 * lane) | ((2 * lane + 1) << 16)));
                for (row, words) in found.iter().enumerate().take(8 * count) {
                    let (matrix, r) = (row / 8, row % 8);
                    for c in 0..8 {
                        // Lane 4r + c/2 holds element c of row r, in its half c % 2.
                        let (line, along) = if trans { (c, r) } else { (r, c) };
                        let expected = (8 * line + along + 256 * matrix) as u32;
                        assert_eq!(words[c / 2] >> (16 * (c % 2)) & 0xffff, expected, "row {row}, column {c}\n{body}");
                    }
                }
            }
        }
    }
    let store = "mov.u32 %r2, tile;\n mad.lo.s32 %r3, %l, 16, %r2;\n stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%v, %v, %v, %v};";
    results(store, &lanes(|lane| lane));
    reports(&store.replace("[%r3]", "[%r3+8]"), 32, Rule::Misaligned, "row of stmatrix");
    reports(&store.replace("[%r3]", "[%r3+4096]"), 32, Rule::OutOfBounds, "stmatrix");
    reports(&store.replace("stmatrix", "setp.lt.u32 %p1, %l, 16;\n @%p1 stmatrix"), 32, Rule::Diverged, "stmatrix");
    // Another warp reads what was stored.
    let shared = "mov.u32 %r2, tile;\n mad.lo.s32 %r3, %l, 16, %r2;\n setp.lt.u32 %p1, %t, 32;\n @!%p1 bra READ;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%v, %v, %v, %v};
READ:
    bar.sync 0;
    @%p1 ret;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];
    st.global.u32 [%out], %r7;";
    always(shared, &[7; 64], |thread| if thread < 32 { 0 } else { 7 });
    let module = module(&shared.replace("bar.sync 0;", ""));
    for seed in 1..=SEEDS {
        let report = run(&module, &[7; 64], seed).expect_err("no barrier");
        assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
    }
}

#[test]
fn ldmatrix_takes_generic_addresses() {
    let body = "
    mov.u32 %r2, tile;
    mad.lo.s32 %r3, %l, 16, %r2;
    st.shared.v4.u32 [%r3], {%v, %v, %v, %v};
    bar.warp.sync -1;
    cvt.u64.u32 %rd2, %r3;
    cvta.shared.u64 %rd3, %rd2;
    ldmatrix.sync.aligned.m8n8.x2.b16 {%r4, %r5}, [%rd3];
    st.global.v2.u32 [%out], {%r4, %r5};";
    let found = results(body, &lanes(|lane| lane));
    for (lane, words) in found.iter().enumerate() {
        assert_eq!(words[..2], [lane as u32 / 4, lane as u32 / 4 + 8]);
    }
    reports(
        &body.replace("x2.b16 {%r4, %r5}, [%rd3]", "x2.b16 {%r4, %r5}, [%in]"),
        32,
        Rule::OutOfBounds,
        "not in shared",
    );
}

#[test]
fn movmatrix_transposes() {
    let body = "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %v;\n st.global.u32 [%out], %r1;";
    let found = results(body, &lanes(|lane| (2 * lane) | ((2 * lane + 1) << 16)));
    for (lane, words) in found.iter().enumerate() {
        let (row, column) = (lane as u32 / 4, lane as u32 % 4 * 2);
        assert_eq!(words[0], (8 * column + row) | ((8 * (column + 1) + row) << 16));
    }
}

#[test]
fn one_lane_is_elected() {
    let body = "
    elect.sync %r1|%p1, -1;
    selp.u32 %r2, 1, 0, %p1;
    st.global.v2.u32 [%out], {%r1, %r2};";
    let found = results(body, &[0; 32]);
    let leaders: Vec<usize> = (0..32).filter(|lane| found[*lane][1] == 1).collect();
    assert_eq!(leaders.len(), 1);
    assert!(found.iter().all(|words| words[0] == leaders[0] as u32));
    let some =
        "setp.ge.u32 %p2, %l, 20;\n @%p2 elect.sync _|%p1, 0xfff00000;\n @!%p2 ret;\n @%p1 st.global.u32 [%out], 1;";
    let some = some.replace("[%out], 1", "[%out], %v");
    assert_eq!(results(&some, &[1; 32]).iter().map(|words| words[0]).sum::<u32>(), 1);
    reports(&some.replace("0xfff00000", "0xffe00000"), 32, Rule::Diverged, "elect.sync");
}

#[test]
fn matches_name_the_lanes_with_the_same_value() {
    let body = "
    match.any.sync.b32 %r1, %v, -1;
    match.all.sync.b32 %r2|%p1, %v, -1;
    selp.u32 %r3, 1, 0, %p1;
    cvt.u64.u32 %rd2, %v;
    shl.b64 %rd2, %rd2, 32;
    match.any.sync.b64 %r4, %rd2, -1;
    match.all.sync.b64 %r5, %rd2, -1;
    st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4};
    st.global.u32 [%out+16], %r5;";
    for input in [lanes(|lane| lane % 5), vec![9; 32]] {
        let same = |lane: usize| (0..32).filter(|i| input[*i] == input[lane]).fold(0u32, |mask, i| mask | 1 << i);
        let all = same(0) == u32::MAX;
        let everyone = if all { u32::MAX } else { 0 };
        for (lane, words) in results(body, &input).iter().enumerate() {
            assert_eq!(words[..5], [same(lane), everyone, u32::from(all), same(lane), everyone], "lane {lane}");
        }
    }
}

#[test]
fn redux_combines_the_lanes() {
    let input = lanes(|lane| lane.wrapping_mul(0x9e37_79b9) ^ 0x5a5a);
    let signed = || input.iter().map(|value| value.cast_signed());
    let expected = [
        ("add.u32", input.iter().fold(0, |sum: u32, value| sum.wrapping_add(*value))),
        ("add.s32", signed().fold(0, i32::wrapping_add).cast_unsigned()),
        ("min.u32", *input.iter().min().expect("not empty")),
        ("max.u32", *input.iter().max().expect("not empty")),
        ("min.s32", signed().min().expect("not empty").cast_unsigned()),
        ("max.s32", signed().max().expect("not empty").cast_unsigned()),
        ("and.b32", input.iter().fold(u32::MAX, |all, value| all & value)),
        ("or.b32", input.iter().fold(0, |all, value| all | value)),
        ("xor.b32", input.iter().fold(0, |all, value| all ^ value)),
    ];
    for (op, expected) in expected {
        always(&format!("redux.sync.{op} %r1, %v, -1;\n st.global.u32 [%out], %r1;"), &input, |_| expected);
    }
    // Of the lanes that are named only.
    let half =
        "setp.lt.u32 %p1, %l, 16;\n @!%p1 ret;\n redux.sync.add.u32 %r1, %v, 0xffff;\n st.global.u32 [%out], %r1;";
    always(half, &[3; 32], |lane| if lane < 16 { 48 } else { 0 });
    reports(&half.replace("0xffff;", "-1;"), 32, Rule::Diverged, "have exited");
    let refused = Module::parse(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() {\n.reg .b32 %r<3>;\nredux.sync.and.u32 %r1, %r2, -1;\n}",
    );
    assert!(refused.expect("parses").kernel_error("k").is_some());
}

#[test]
fn votes() {
    let body = "
    setp.ne.u32 %p1, %v, 0;
    vote.sync.all.pred %p2, %p1, -1;
    vote.sync.any.pred %p3, %p1, -1;
    vote.sync.uni.pred %p4, !%p1, -1;
    vote.sync.ballot.b32 %r1, !%p1, -1;
    selp.u32 %r2, 1, 0, %p2;
    selp.u32 %r3, 1, 0, %p3;
    selp.u32 %r4, 1, 0, %p4;
    st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4};";
    for (input, expected) in [
        (vec![1; 32], [0, 1, 1, 1]),
        (vec![0; 32], [u32::MAX, 0, 0, 1]),
        (lanes(|lane| lane & 1), [0x5555_5555, 0, 1, 0]),
    ] {
        assert!(results(body, &input).iter().all(|words| words[..4] == expected));
    }
}

/// A and B of small integers, C of others; the fragments as the ISA's figures show them.
#[test]
fn mma_with_f16_accumulators() {
    for k in [8usize, 16] {
        let a = |row: usize, k: usize| ((row * 3 + k * 5) % 7) as f32 - 3.0;
        let b = |k: usize, column: usize| ((k * 2 + column * 3) % 5) as f32 - 2.0;
        let c = |row: usize, column: usize| ((row + 2 * column) % 9) as f32 + 0.5;
        let pack = |low: f32, high: f32| {
            u32::from(f16::from_f32(low).to_bits()) | u32::from(f16::from_f32(high).to_bits()) << 16
        };
        let mut stores = String::new();
        // Each lane's fragments are written into the code: `%r` by lane would need memory, a chain of selects does not.
        for lane in 0..32usize {
            let (g, t) = (lane / 4, lane % 4 * 2);
            stores += &format!("setp.eq.u32 %p1, %l, {lane};\n");
            let mut set = |register: usize, value: u32| stores += &format!("@%p1 mov.b32 %r{register}, {value};\n");
            for i in 0..k / 4 {
                let (row, k) = (g + 8 * (i % 2), t + 8 * (i / 2));
                set(i, pack(a(row, k), a(row, k + 1)));
            }
            for i in 0..k / 8 {
                set(8 + i, pack(b(t + 8 * i, g), b(t + 8 * i + 1, g)));
            }
            for i in 0..2 {
                set(12 + i, pack(c(g + 8 * i, t), c(g + 8 * i, t + 1)));
            }
        }
        let (fragment_a, fragment_b) =
            if k == 8 { ("{%r0, %r1}", "{%r8}") } else { ("{%r0, %r1, %r2, %r3}", "{%r8, %r9}") };
        let body = format!(
            "{stores} mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16 {{%r20, %r21}}, {fragment_a}, {fragment_b}, {{%r12, %r13}};
    st.global.v2.u32 [%out], {{%r20, %r21}};"
        );
        for (lane, words) in results(&body, &[0; 32]).iter().enumerate() {
            let (g, t) = (lane / 4, lane % 4 * 2);
            for (i, word) in words[..2].iter().enumerate() {
                let row = g + 8 * i;
                let sum = |column: usize| (0..k).map(|k| a(row, k) * b(k, column)).sum::<f32>() + c(row, column);
                assert_eq!(*word, pack(sum(t), sum(t + 1)), "k {k}, lane {lane}, register {i}");
            }
        }
    }
}

#[test]
fn barriers_reduce() {
    let input: Vec<u32> = (0..96).map(|thread| u32::from(thread % 3 == 0)).collect();
    for form in ["bar.red.{}", "bar.cta.red.{}", "barrier.red.{}", "barrier.cta.red.{op}.aligned.{ty}"] {
        let red = |op: &str, ty: &str| match form.strip_suffix("{}") {
            Some(start) => format!("{start}{op}.{ty}"),
            None => form.replace("{op}", op).replace("{ty}", ty),
        };
        let body = format!(
            "setp.ne.u32 %p1, %v, 0;
    {} %r1, 0, %p1;
    {} %p2, 0, !%p1;
    {} %p3, 1, 96, %p1;
    selp.u32 %r2, 1000, 0, %p2;
    selp.u32 %r3, 2000, 0, %p3;
    add.s32 %r1, %r1, %r2;
    add.s32 %r1, %r1, %r3;
    st.global.u32 [%out], %r1;",
            red("popc", "u32"),
            red("and", "pred"),
            red("or", "pred")
        );
        always(&body, &input, |_| 32 + 2000);
        always(&body, &[0; 96], |_| 1000);
    }
    let mixed = "setp.ne.u32 %p1, %v, 0;\n setp.lt.u32 %p2, %t, 32;\n @%p2 bra SYNC;\n bar.red.popc.u32 %r1, 0, %p1;\n ret;\nSYNC:\n bar.sync 0;";
    reports(mixed, 64, Rule::BarrierMisuse, "bar.red");
}

/// The halves of each warp meet at one barrier, from two places in the program.
#[test]
fn lanes_arrive_at_barriers_of_their_own() {
    let body = "
    mov.u32 %r2, tile;
    shl.b32 %r3, %t, 2;
    add.s32 %r3, %r3, %r2;
    xor.b32 %r4, %t, 48;
    shl.b32 %r4, %r4, 2;
    add.s32 %r4, %r4, %r2;
    st.shared.u32 [%r3], %t;
    setp.lt.u32 %p1, %l, 16;
    @%p1 bra LOW;
    barrier.sync 1, 64;
    bra BOTH;
LOW:
    barrier.sync 1, 64;
BOTH:
    ld.shared.u32 %r5, [%r4];
    st.global.u32 [%out], %r5;";
    always(body, &[0; 64], |thread| thread as u32 ^ 48);
    reports(&body.replacen("barrier.sync 1", "barrier.sync 2", 1), 64, Rule::Deadlock, "waits at barrier 1");
    reports(&body.replace("barrier.sync", "barrier.sync.aligned"), 64, Rule::Diverged, "barrier.sync.aligned");
    let arrive = body
        .replacen("barrier.sync 1, 64;\n    bra BOTH", "barrier.arrive 1, 64;\n    ret", 1)
        .replace("xor.b32 %r4, %t, 48", "xor.b32 %r4, %t, 16");
    always(&arrive, &[0; 64], |thread| if thread % 32 < 16 { thread as u32 ^ 16 } else { 0 });
}

/// A producer gives registers back, consumers take them.
const RESIZE: &str = "
    setp.lt.u32 %p1, %t, 128;
    @%p1 bra PRODUCER;
    setmaxnreg.inc.sync.aligned.u32 232;
    bra DONE;
PRODUCER:
    setmaxnreg.dec.sync.aligned.u32 40;
DONE:
    st.global.u32 [%out], 1;";

#[test]
fn registers_are_given_back_before_they_are_taken() {
    let body = RESIZE.replace("[%out], 1", "[%out], %v");
    always(&body, &[1; 384], |_| 1);
    reports(&body.replace("232", "240"), 384, Rule::Deadlock, "waits for 240 registers per thread");
    reports(&body.replace("setmaxnreg.dec.sync.aligned.u32 40;", ""), 384, Rule::Deadlock, "waits for 232 registers");
    reports(&body.replace("128;", "96;").replace("232", "200"), 384, Rule::Diverged, "setmaxnreg");
    reports("setmaxnreg.dec.sync.aligned.u32 40;", 96, Rule::Diverged, "not part of four whole warps");
    reports(
        "setp.lt.u32 %p1, %t, 96;\n @%p1 setmaxnreg.dec.sync.aligned.u32 40;",
        128,
        Rule::Diverged,
        "have not both executed this setmaxnreg",
    );
    for count in ["16", "36", "264"] {
        let text = format!(
            ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() {{\nsetmaxnreg.inc.sync.aligned.u32 {count};\n}}"
        );
        let error = Module::parse(&text).expect("parses").kernel_error("k").map(ToString::to_string);
        assert!(error.is_some_and(|error| error.contains("multiple of 8 from 24 to 256")));
    }
}

#[test]
fn caches_are_spoken_to() {
    // A prefetch may name any address.
    results(
        "prefetch.global.L2 [%in+1000000];\n prefetch.L1 [%in];\n prefetchu.L1 [%in];\n griddepcontrol.wait;\n griddepcontrol.launch_dependents;\n nanosleep.u32 20;",
        &[0; 32],
    );
    let line =
        "and.b64 %rd2, %in, -128;\n applypriority.global.L2::evict_normal [%rd2], 128;\n ld.global.u32 %r1, [%in];";
    results(line, &[0; 32]);
    reports(&line.replace("[%rd2]", "[%rd2+4]"), 32, Rule::Misaligned, "applypriority");
    reports(&line.replace("[%rd2]", "[%rd2+128]"), 32, Rule::OutOfBounds, "applypriority");
    // What was discarded is as if it had never been written.
    let discard = "and.b64 %rd2, %in, -128;\n setp.eq.u32 %p1, %t, 0;\n bar.warp.sync -1;\n @%p1 discard.global.L2 [%rd2], 128;\n bar.warp.sync -1;\n ld.global.u32 %r1, [%in];";
    reports(discard, 32, Rule::Uninitialised, "`in`");
}

#[test]
fn special_registers() {
    let body = "
    mov.u32 %r1, %smid;
    mov.u32 %r2, %nsmid;
    mov.u32 %r3, %nwarpid;
    mov.u32 %r4, WARP_SZ;
    mov.u32 %r5, %envreg3;
    mov.u32 %r6, %pm0;
    mov.u64 %rd2, %globaltimer;
    mov.u64 %rd3, %gridid;
    st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4};
    st.global.v2.u32 [%out+16], {%r5, %r6};
    st.global.v2.u64 [%out+32], {%rd2, %rd3};";
    let found = results(body, &[0; 32]);
    assert_eq!(found[0][..6], [0, 4, 64, 32, 0, 0]);
    assert!(found[0][8] > 0 && found[0][10] == 0);
}
