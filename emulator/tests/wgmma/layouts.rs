//! Matrices in shared memory, as the ISA's figures draw them: lines of 16, 32, 64 or 128 bytes, whose units of 16 bytes change
//! places from line to line.

/// How an operand lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    pub mn_major: bool,
    /// Bytes of a line: 16 without swizzling.
    pub line: usize,
    /// Atoms that are neighbours in memory are neighbours along K, not along the other dimension.
    pub k_first: bool,
}

const fn layout(mn_major: bool, line: usize, k_first: bool) -> Layout {
    Layout { mn_major, line, k_first }
}

pub const LAYOUTS: &[Layout] = &[
    layout(false, 16, false),
    layout(false, 16, true),
    layout(false, 32, false),
    layout(false, 64, false),
    layout(false, 128, false),
    layout(true, 16, false),
    layout(true, 16, true),
    layout(true, 32, true),
    layout(true, 64, false),
    layout(true, 64, true),
    layout(true, 128, false),
    layout(true, 128, true),
];

impl Layout {
    /// Elements of an atom along the dimension that is not K, and along K.
    fn atom(&self) -> (usize, usize) {
        if self.mn_major { (self.line / 2, 8) } else { (8, self.line / 2) }
    }

    /// Distance of neighbouring atoms along either dimension.
    fn strides(&self, rows: usize) -> (usize, usize) {
        let (atom_mn, atom_k) = self.atom();
        let bytes = 8 * self.line;
        if self.k_first { (bytes * 16usize.div_ceil(atom_k), bytes) } else { (bytes, bytes * rows.div_ceil(atom_mn)) }
    }

    /// Places every element.
    pub fn write(&self, memory: &mut [u8], rows: usize, element: impl Fn(usize, usize) -> u16) {
        let (atom_mn, atom_k) = self.atom();
        let (along_mn, along_k) = self.strides(rows);
        for mn in 0..rows {
            for k in 0..16 {
                let atom = mn / atom_mn * along_mn + k / atom_k * along_k;
                let (mn_in, k_in) = (mn % atom_mn, k % atom_k);
                let (line, along) = if self.mn_major { (k_in, mn_in) } else { (mn_in, k_in) };
                // The pattern is one of 128-byte lines: shorter ones share them.
                let unit = match self.line {
                    128 => (along / 8) ^ line,
                    64 => (along / 8) ^ (line / 2),
                    32 => (along / 8) ^ (line / 4),
                    _ => along / 8,
                };
                let at = atom + line * self.line + unit * 16 + along % 8 * 2;
                memory[at..at + 2].copy_from_slice(&element(mn, k).to_le_bytes());
            }
        }
    }

    /// The descriptor of a matrix at address 0.
    pub fn descriptor(&self, rows: usize) -> u64 {
        let (along_mn, along_k) = self.strides(rows);
        let (leading, stride) = match (self.mn_major, self.line) {
            (_, 16) => (along_k, along_mn),
            (false, _) => (16, along_mn),
            (true, _) => (along_mn, along_k),
        };
        let swizzle = match self.line {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0u64,
        };
        (leading as u64 / 16) << 16 | (stride as u64 / 16) << 32 | swizzle << 62
    }
}
