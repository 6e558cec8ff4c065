use super::*;

/// Fragment maps element by element: `(row, column)` of element i in lane `lane`, as the ISA's figures give them.
fn a_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane & 3);
    let row = if matches!(i, 0 | 1 | 4 | 5) { g } else { g + 8 };
    (row, 2 * t + (i & 1) + if i >= 4 { 8 } else { 0 })
}

fn b_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane & 3);
    (2 * t + (i & 1) + if i >= 2 { 8 } else { 0 }, g)
}

fn c_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane & 3);
    (g + if i >= 2 { 8 } else { 0 }, 2 * t + (i & 1))
}

type Encode = fn(f32) -> u16;
const FORMATS: [(Ty, Encode); 2] =
    [(Ty::F16, |x| half::f16::from_f32(x).to_bits()), (Ty::Bf16, |x| half::bf16::from_f32(x).to_bits())];

fn run(k: usize, ab: Ty, encode: Encode, a: &[Vec<f32>], b: &[Vec<f32>], c: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let pack = |at: &dyn Fn(usize, usize) -> f32, register: usize| -> Lanes {
        std::array::from_fn(|lane| {
            let [low, high] = [0, 1].map(|half| u64::from(encode(at(lane, 2 * register + half))));
            low | high << 16
        })
    };
    let element = |m: &[Vec<f32>], (row, column): (usize, usize)| m[row][column];
    let a: Vec<Lanes> = (0..k / 4).map(|r| pack(&|lane, i| element(a, a_at(lane, i)), r)).collect();
    let b: Vec<Lanes> = (0..k / 8).map(|r| pack(&|lane, i| element(b, b_at(lane, i)), r)).collect();
    let c: [Lanes; 4] = std::array::from_fn(|i| std::array::from_fn(|lane| element(c, c_at(lane, i)).to_bits().into()));
    let d = mma(k as u8, ab, &a.iter().collect::<Vec<_>>(), &b.iter().collect::<Vec<_>>(), c.each_ref());
    let mut result = vec![vec![f32::NAN; 8]; 16];
    for (i, d) in d.iter().enumerate() {
        for (lane, bits) in d.iter().enumerate() {
            let (row, column) = c_at(lane, i);
            result[row][column] = f32::from_bits(*bits as u32);
        }
    }
    result
}

fn matrix(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f32) -> Vec<Vec<f32>> {
    (0..rows).map(|i| (0..columns).map(|j| f(i, j)).collect()).collect()
}

/// One factor picks out single elements of the other, which all differ: every position is seen by itself.
#[test]
fn each_element_is_in_its_place() {
    for k in [8, 16] {
        for (ab, encode) in FORMATS {
            let identity = |i: usize, j: usize| f32::from(u8::from(i == j));
            // 256 distinct values that both formats hold: sign, 8 powers of two, 16 significands.
            let distinct = |i: usize, j: usize, columns: usize| {
                let n = i * columns + j;
                let magnitude = (16 + n % 16) as f32 * 2f32.powi((n / 16 % 8) as i32 - 4);
                if n < 128 { magnitude } else { -magnitude }
            };
            let a = matrix(16, k, |i, j| distinct(i, j, k));
            let b = matrix(k, 8, |i, j| distinct(i, j, 8));
            let zero = matrix(16, 8, |_, _| 0.0);
            for shift in (0..k).step_by(8) {
                let d = run(k, ab, encode, &a, &matrix(k, 8, |i, j| identity(i, j + shift)), &zero);
                assert_eq!(d, matrix(16, 8, |i, j| a[i][j + shift]), "A, {ab:?}, k {k}");
            }
            let d = run(k, ab, encode, &matrix(16, k, |i, j| identity(i % k, j)), &b, &zero);
            assert_eq!(d, matrix(16, 8, |i, j| b[i % k][j]), "B, {ab:?}, k {k}");
            let c = matrix(16, 8, |i, j| (i * 8 + j) as f32 + 0.125);
            assert_eq!(run(k, ab, encode, &matrix(16, k, |_, _| 0.0), &b, &c), c, "C, {ab:?}, k {k}");
        }
    }
}

/// Small integers: every sum is exact, whatever its order.
#[test]
fn products_of_integers() {
    let mut random = Random(21);
    for k in [8, 16] {
        for (ab, encode) in FORMATS {
            for _ in 0..50 {
                let mut fill = |rows: usize, columns: usize| -> Vec<Vec<f32>> {
                    (0..rows).map(|_| (0..columns).map(|_| (random.next() % 255) as f32 - 127.0).collect()).collect()
                };
                let (a, b, c) = (fill(16, k), fill(k, 8), fill(16, 8));
                let expected = matrix(16, 8, |i, j| (0..k).map(|l| a[i][l] * b[l][j]).sum::<f32>() + c[i][j]);
                assert_eq!(run(k, ab, encode, &a, &b, &c), expected);
            }
        }
    }
}

/// The order this model promises: C first, then k upwards, each step rounded to f32.
#[test]
fn sums_are_in_order() {
    let big = 2f32.powi(24);
    for (ab, encode) in FORMATS {
        // big + 1 - big + 1 ... in f32: the first 1 is lost to rounding, the second is not.
        let terms = [1.0, -big / 4096.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let a = matrix(16, 8, |_, j| terms[j]);
        let b = matrix(8, 8, |i, _| if i == 1 { 4096.0 } else { 1.0 });
        let c = matrix(16, 8, |_, _| big);
        assert_eq!(run(8, ab, encode, &a, &b, &c), matrix(16, 8, |_, _| 1.0));
    }
}

#[test]
fn nan_is_canonical() {
    for (ab, encode) in FORMATS {
        let a = matrix(16, 8, |i, _| if i == 3 { f32::INFINITY } else { 1.0 });
        let b = matrix(8, 8, |i, _| if i == 0 { 0.0 } else { 1.0 });
        let d = run(8, ab, encode, &a, &b, &matrix(16, 8, |_, _| 0.5));
        for (i, row) in d.iter().enumerate() {
            for x in row {
                assert_eq!(x.to_bits(), if i == 3 { 0x7fff_ffff } else { 7.5f32.to_bits() });
            }
        }
    }
}
