//! "Warp Level Matrix Instructions": mma.sync and ldmatrix, by the fragment layouts of their sections.

use ptx_emulator::Module;

use crate::harness::{Case, run};

/// "Matrix Fragments for mma.m16n8k16 / m16n8k8": small integers, so that every order of summation gives the same.
#[test]
fn products() {
    let a = |row: u32, k: u32| f64::from((row * 7 + k * 3) % 11) - 5.0;
    let b = |k: u32, col: u32| f64::from((k * 5 + col * 2) % 9) - 4.0;
    let c = |row: u32, col: u32| f64::from(row * 8 + col);
    for ty in ["f16", "bf16"] {
        let bits = |x: f64| match ty {
            "f16" => half::f16::from_f64(x).to_bits(),
            _ => half::bf16::from_f64(x).to_bits(),
        };
        let pair = |low: f64, high: f64| u64::from(bits(low)) | u64::from(bits(high)) << 16;
        for (shape, depth) in [("m16n8k8", 8u32), ("m16n8k16", 16)] {
            let lanes: Vec<[u64; 3]> = (0..32u32)
                .map(|lane| {
                    let (group, thread) = (lane / 4, lane % 4);
                    let half = |row: u32, k: u32| pair(a(row, k), a(row, k + 1));
                    let first = half(group, 2 * thread) | half(group + 8, 2 * thread) << 32;
                    let second = half(group, 2 * thread + 8) | half(group + 8, 2 * thread + 8) << 32;
                    let col = |k: u32| pair(b(k, group), b(k + 1, group));
                    [first, second, col(2 * thread) | col(2 * thread + 8) << 32]
                })
                .collect();
            let sources = if depth == 8 { "{%r1, %r2}, {%r5}" } else { "{%r1, %r2, %r3, %r4}, {%r5, %r6}" };
            // c from the lane's place: row · 8 + column; then one of the four results.
            for part in 0..4u32 {
                let text = format!(
                    ".reg .f32 %f<10>; mov.b64 {{%r1, %r2}}, %a; mov.b64 {{%r3, %r4}}, %b; mov.b64 {{%r5, %r6}}, %c; \
                     shr.u32 %r7, %t, 2; shl.b32 %r7, %r7, 3; and.b32 %r0, %t, 3; mad.lo.u32 %r7, %r0, 2, %r7; \
                     cvt.rn.f32.u32 %f0, %r7; add.f32 %f1, %f0, 0f3F800000; add.f32 %f2, %f0, 0f42800000; add.f32 %f3, %f1, 0f42800000; \
                     mma.sync.aligned.{shape}.row.col.f32.{ty}.{ty}.f32 {{%f4, %f5, %f6, %f7}}, {sources}, {{%f0, %f1, %f2, %f3}}; \
                     mov.b32 %r1, %f{}; cvt.u64.u32 %d, %r1;",
                    4 + part
                );
                let module = Module::parse(&Case::new(&text, "", [64; 4], |_| 0).kernel()).expect("parses");
                let found = run(&module, &lanes).unwrap_or_else(|report| panic!("{text}: {report}"));
                for (lane, found) in (0u32..).zip(found) {
                    let (row, col) = (lane / 4 + part / 2 * 8, lane % 4 * 2 + part % 2);
                    let expected = c(row, col) + (0..depth).map(|k| a(row, k) * b(k, col)).sum::<f64>();
                    assert_eq!(
                        f64::from(f32::from_bits(found as u32)),
                        expected,
                        "{shape} {ty} row {row} column {col}"
                    );
                }
            }
        }
    }
}

/// "ldmatrix": rows at the addresses of eight lanes each, two elements of a row to each lane; transposed with `.trans`.
#[test]
fn matrices_from_shared_memory() {
    for (count, matrices) in [("x1", 1usize), ("x2", 2), ("x4", 4)] {
        for trans in [false, true] {
            // ptxas takes shape and number in either order.
            for (space, form) in [("shared", "m8n8.x"), ("shared::cta", "m8n8.x"), ("shared", "x.m8n8")] {
                let form = form.replace('x', count);
                for matrix in 0..matrices {
                    let registers: Vec<String> = (0..matrices).map(|i| format!("%r{i}")).collect();
                    // Row r of matrix m holds 64m + 8r + column, at 16 bytes · (8m + r).
                    let text = format!(
                        ".shared .align 16 .b8 tile[512]; mov.u32 %r7, tile; mad.lo.u32 %r7, %t, 16, %r7; \
                         st.shared.v2.b64 [%r7], {{%a, %b}}; bar.warp.sync -1; \
                         ldmatrix.sync.aligned.{form}{}.{space}.b16 {{{}}}, [%r7]; mov.u32 %d, %r{matrix};",
                        if trans { ".trans" } else { "" },
                        registers.join(", ")
                    );
                    let kernel = Case::new(&text, "", [32, 64, 64, 32], |_| 0).kernel();
                    let module = Module::parse(&kernel).expect("parses");
                    let row =
                        |lane: u64, first: u64| (0..4).fold(0, |word, i| word | (lane * 8 + first + i) << (16 * i));
                    let lanes: Vec<[u64; 3]> = (0..32).map(|lane| [row(lane, 0), row(lane, 4), 0]).collect();
                    let found = run(&module, &lanes).unwrap_or_else(|report| panic!("{text}: {report}"));
                    for (lane, found) in (0u64..).zip(found) {
                        let (row, col) = (lane / 4, lane % 4 * 2);
                        let at = |row: u64, col: u64| 64 * matrix as u64 + 8 * row + col;
                        let expected = if trans {
                            at(col, row) | at(col + 1, row) << 16
                        } else {
                            at(row, col) | at(row, col + 1) << 16
                        };
                        assert_eq!(found, expected, "{text}, lane {lane}");
                    }
                }
            }
        }
    }
}
