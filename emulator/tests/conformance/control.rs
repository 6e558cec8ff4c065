//! "Control Flow Instructions", functions, module variables, special registers.

use ptx_emulator::{Launch, Memory, Module, Options, Rule};

use crate::harness::{Case, run};

/// One kernel in the harness's shape, with other items of the module before it.
fn check(items: &str, text: &str, inputs: Vec<[u64; 3]>, expect: fn([u64; 3]) -> u64) {
    let kernel =
        Case::new(text, "", [32; 4], |_| 0).kernel().replace(".visible .entry", &format!("{items}\n.visible .entry"));
    let module = Module::parse(&kernel).expect("parses");
    let found = run(&module, &inputs).unwrap_or_else(|report| panic!("{text}: {report}"));
    for (inputs, found) in inputs.iter().zip(found) {
        assert_eq!(found, expect(*inputs), "{text} of {inputs:?}");
    }
}

fn lanes() -> Vec<[u64; 3]> {
    (0..32).map(|i| [i, i % 5, 100 + i]).collect()
}

#[test]
fn branches_and_guards() {
    let text = "setp.lt.u32 %p1, %b, 2; @%p1 bra LOW; add.u32 %d, %a, 1000; bra.uni DONE; LOW: mov.u32 %d, %c; @!%p1 mov.u32 %d, 0; DONE:";
    check("", text, lanes(), |[a, b, c]| if b < 2 { c } else { a + 1000 });
    // Loops of different lengths in one warp.
    let text = "mov.u32 %d, 0; AGAIN: add.u32 %d, %d, %a; setp.ne.u32 %p1, %b, 0; sub.u32 %b, %b, 1; @%p1 bra AGAIN;";
    check("", text, lanes(), |[a, b, _]| a * (b + 1));
    check("", "mov.u32 %d, 7; @%p1 exit; nanosleep.u32 20;", vec![[0; 3]], |_| 7);
}

/// "brx.idx": a jump through a list of labels, diverged.
#[test]
fn indexed_branches() {
    let text = "ts: .branchtargets A, B, C, B, A; brx.idx %b, ts; A: mov.u32 %d, 1; bra END; B: mov.u32 %d, 2; bra END; C: mov.u32 %d, %a; END:";
    check("", text, lanes(), |[a, b, _]| [1, 2, a, 2, 1][b as usize]);
    check("", &text.replace("brx.idx", "brx.idx.uni"), vec![[9, 2, 0]; 32], |[a, ..]| a);
    let module = Module::parse(&Case::new(text, "", [32; 4], |_| 0).kernel()).expect("parses");
    let report = run(&module, &[[0, 5, 0]]).expect_err("out of range");
    assert_eq!(report.rule, Rule::Trap, "{report}");
}

const FUNCTIONS: &str = "
.func (.param .b32 r) twice(.param .b32 x)
{
    .reg .b32 %r<3>;
    ld.param.u32 %r1, [x];
    add.u32 %r2, %r1, %r1;
    st.param.b32 [r+0], %r2;
    ret;
}
.func (.param .b32 r) factorial(.param .b32 x)
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<3>;
    .reg .pred %p<2>;
    .local .align 4 .b8 kept[4];
    ld.param.u32 %r1, [x];
    mov.u64 %rd1, kept;
    st.local.u32 [%rd1], %r1;
    mov.u32 %r4, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra DONE;
    sub.u32 %r2, %r1, 1;
    {
        .param .b32 argument;
        .param .b32 result;
        st.param.b32 [argument], %r2;
        call (result), factorial, (argument);
        ld.param.b32 %r3, [result];
    }
    ld.local.u32 %r5, [%rd1];
    mul.lo.u32 %r4, %r3, %r5;
DONE:
    st.param.b32 [r], %r4;
    ret;
}
.func nothing() { ret.uni; }";

/// "call", "ret" and the state space `.param`.
#[test]
fn functions() {
    let call = |name: &str| {
        format!(
            "{{ .param .b32 x; .param .b32 y; st.param.b32 [x], %b; call.uni (y), {name}, (x); ld.param.b32 %d, [y]; }}"
        )
    };
    check(FUNCTIONS, &format!("{} add.u32 %d, %d, %c; call nothing;", call("twice")), lanes(), |[_, b, c]| 2 * b + c);
    // Half of the warp calls, and the lanes recurse to different depths.
    let text = format!("mov.u32 %d, 5; setp.lt.u32 %p1, %a, 16; @%p1 bra AFTER; {} AFTER:", call("factorial"));
    check(FUNCTIONS, &text, lanes(), |[a, b, _]| if a < 16 { 5 } else { (1..=b).product() });
    let too_deep = format!("mov.u32 %b, 1000; {}", call("factorial"));
    let kernel =
        Case::new(&too_deep, "", [32; 4], |_| 0).kernel().replace(".visible", &format!("{FUNCTIONS}\n.visible"));
    let report = run(&Module::parse(&kernel).expect("parses"), &[[0; 3]]).expect_err("too deep");
    assert_eq!(report.rule, Rule::Trap);
    assert!(report.message.contains("deeper than 64"), "{report}");
}

/// Calls that cannot be made are errors that say so.
#[test]
fn calls_that_are_not_implemented() {
    for (items, text, named) in [
        ("", "call %l1;", "calls through a register"),
        (
            ".extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 v);",
            "{ .param .b32 r; .param .b64 f; .param .b64 v; call (r), vprintf, (f, v); }",
            "`vprintf`",
        ),
        (
            ".extern .func (.param .b64 r) malloc(.param .b64 n);",
            "{ .param .b64 r; .param .b64 n; call (r), malloc, (n); }",
            "`malloc`",
        ),
        (FUNCTIONS, "{ .param .b64 x; .param .b32 y; call (y), twice, (x); }", "does not suit"),
        (FUNCTIONS, "call twice, (%r1);", "only `.param` variables"),
        (".extern .global .u32 elsewhere;", "ld.global.u32 %d, [elsewhere];", "`elsewhere` is declared `.extern`"),
    ] {
        let kernel = Case::new(text, "", [32; 4], |_| 0).kernel().replace(".visible", &format!("{items}\n.visible"));
        let module = Module::parse(&kernel).expect("parses");
        let error = module.kernel_error("k").expect(text).to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// "Initializers", `.const`, addresses of variables, and what a launch leaves in them.
#[test]
fn module_variables() {
    let items = "
.global .align 4 .u32 counter = 40;
.const .align 4 .b8 bytes[8] = {1, 2, 3, 4, 0xff, -1};
.global .u64 pointer = generic(words) + 4;
.global .align 8 .u64 pair[2] = {counter, 7};
.global .align 4 .f32 words[3] = {0f3F800000, 0f40000000};
.global .u32 matrix[2][2] = {{1, 2}, {3, 4}};";
    let text = "
atom.global.add.u32 %r1, [counter], 1;
mov.u64 %l1, bytes; ld.const.u32 %r2, [%l1]; ld.const.b8 %r3, [bytes+5]; cvta.const.u64 %l4, %l1; ld.u8 %r6, [%l4+1];
ld.global.u64 %l2, [pointer]; ld.u32 %r4, [%l2]; ld.global.u64 %l3, [pair]; ld.global.u32 %r5, [matrix+8];
prmt.b32 %d, %r2, 0, 0x0321; xor.b32 %d, %d, %r3; xor.b32 %d, %d, %r4; add.u32 %d, %d, %r5; add.u32 %d, %d, %r6;
mov.u64 %l5, counter; setp.ne.u64 %p1, %l5, %l3; @%p1 trap;";
    check(items, text, lanes(), |_| ((0x0104_0302 ^ 0xff) ^ 0x4000_0000) + 3 + 2);
    let kernel = Case::new(text, "", [32; 4], |_| 0).kernel().replace(".visible", &format!("{items}\n.visible"));
    let module = Module::parse(&kernel).expect("parses");
    let mut memory = Memory::new();
    let (input, output) = (memory.alloc("in", 24), memory.alloc("out", 8));
    memory.write(input, &[0; 24]).expect("in range");
    let params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
    let launch = Launch { kernel: "k", grid: [1; 3], cluster: [1; 3], block: [1; 3], shared_bytes: 0, params: &params };
    for expected in 41..44u32 {
        module.launch(&mut memory, &launch, &Options::default()).expect("runs");
        let (address, bytes) = module.variable(&mut memory, "counter").expect("there");
        assert_eq!(memory.read(address, bytes).expect("written"), expected.to_le_bytes());
    }
    let writes =
        kernel.replace("atom.global.add.u32 %r1, [counter], 1;", "mov.u64 %l6, bytes; st.global.u32 [%l6], 1;");
    let report = run(&Module::parse(&writes).expect("parses"), &[[0; 3]]).expect_err("constant");
    assert!(report.message.contains("`bytes` at offset 0 is constant"), "{report}");
    let beyond = kernel.replace("[matrix+8]", "[matrix+16]");
    let report = run(&Module::parse(&beyond).expect("parses"), &[[0; 3]]).expect_err("beyond the end");
    assert_eq!(report.rule, Rule::OutOfBounds, "{report}");
}

/// `assert` as nvcc compiles it.
#[test]
fn failed_assertions_are_quoted() {
    let items = "
.extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s);
.global .align 1 .b8 message[6] = {110, 32, 62, 32, 48};
.global .align 1 .b8 file[5] = {97, 46, 99, 117};
.global .align 1 .b8 function[2] = {107};";
    let text = "mov.u32 %d, 1; setp.ne.u32 %p1, %a, 3; @%p1 bra FINE;
{ .param .b64 m; .param .b64 f; .param .b32 l; .param .b64 n; .param .b64 s;
  mov.u64 %l1, message; cvta.global.u64 %l1, %l1; st.param.b64 [m], %l1; mov.u64 %l2, file; st.param.b64 [f], %l2;
  st.param.b32 [l], 12; mov.u64 %l3, function; st.param.b64 [n], %l3; st.param.b64 [s], 1;
  call.uni __assertfail, (m, f, l, n, s); }
FINE:";
    check(items, text, vec![[4, 0, 0]; 3], |_| 1);
    let kernel = Case::new(text, "", [32; 4], |_| 0).kernel().replace(".visible", &format!("{items}\n.visible"));
    let report = run(&Module::parse(&kernel).expect("parses"), &lanes()).expect_err("lane 3 fails");
    assert_eq!(report.rule, Rule::Trap);
    assert!(report.message.contains("assertion `n > 0` failed at a.cu:12 in `k`"), "{report}");
    assert_eq!(report.site.and_then(|site| site.lane), Some(3));
}

#[test]
fn special_registers() {
    for (name, expect) in [
        ("%tid.x", (|[a, ..]| a) as fn([u64; 3]) -> u64),
        ("%tid.y", |_| 0),
        ("%ntid.x", |_| 32),
        ("%ctaid.z", |_| 0),
        ("%nctaid.y", |_| 1),
        ("%laneid", |[a, ..]| a),
        ("%warpid", |_| 0),
        ("%nwarpid", |_| 64),
        ("%smid", |_| 0),
        ("%nsmid", |_| 4),
        ("%lanemask_eq", |[a, ..]| 1 << a),
        ("%lanemask_lt", |[a, ..]| (1 << a) - 1),
        ("%lanemask_le", |[a, ..]| (2 << a) - 1),
        ("%lanemask_ge", |[a, ..]| 0xffff_ffff & !((1 << a) - 1)),
        ("%lanemask_gt", |[a, ..]| 0xffff_ffff & !((2 << a) - 1)),
        ("%dynamic_smem_size", |_| 0),
        ("WARP_SZ", |_| 32),
    ] {
        check("", &format!("mov.u32 %d, {name};"), lanes(), expect);
    }
    check(
        "",
        "mov.u32 %r1, %clock; mov.u64 %l1, %globaltimer; mov.u64 %l2, %clock64; setp.le.u64 %p1, %l1, %l2; selp.u32 %d, 1, 0, %p1;",
        lanes(),
        |_| 1,
    );
    // What a program cannot see.
    check(
        "",
        "prefetch.global.L2 [%in]; prefetch.L1 [%in]; prefetchu.L1 [%in]; prefetch.global.L2::evict_normal [%in]; pmevent 3; pmevent.mask 3; createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %l2, 0f3F000000; createpolicy.fractional.L2::evict_first.b64 %l1, 0f3F800000; mov.u32 %d, 1;",
        lanes(),
        |_| 1,
    );
}
