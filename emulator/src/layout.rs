//! Where the elements of matrices lie: in fragments, in shared memory, behind descriptors.
//!
//! PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions: Register Fragments and Shared Memory
//! Matrix Layouts" and "Warp Level Matrix Load Instruction: ldmatrix". Public for the cross-check against other
//! implementations of the same layouts; not part of the API.

/// Which dimension of an operand of `wgmma` is contiguous: K, or the other one (M of A, N of B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Major {
    /// `imm-trans` 0.
    K,
    /// `imm-trans` 1.
    Mn,
}

/// Swizzling mode of a shared-memory matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Interleaved core matrices.
    None,
    /// Rows of 32 bytes.
    B32,
    /// Rows of 64 bytes.
    B64,
    /// Rows of 128 bytes.
    B128,
}

impl Swizzle {
    /// Bytes of a row of the pattern; 16 without swizzling.
    pub fn row_bytes(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// Bytes after which the pattern repeats: eight rows.
    pub fn pattern_bytes(self) -> u32 {
        8 * self.row_bytes()
    }

    /// Where the byte lies that would be at `address` without swizzling: the 16-byte unit within 128 bytes is combined with
    /// the number of the 128-byte line, by exclusive or.
    pub fn apply(self, address: u32) -> u32 {
        let mask = self.row_bytes() / 16 - 1;
        address ^ ((address >> 7 & mask) << 4)
    }
}

/// A matrix descriptor of `wgmma` ("Matrix Descriptor Format"), lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Address of the matrix in shared memory.
    pub start: u32,
    /// "Leading dimension byte offset".
    pub leading: u32,
    /// "Stride dimension byte offset".
    pub stride: u32,
    /// "Matrix base offset".
    pub base_offset: u8,
    /// Swizzling mode.
    pub swizzle: Swizzle,
    /// The bits that have no meaning.
    pub reserved: u64,
}

const FIELDS: u64 = 0x3fff | 0x3fff << 16 | 0x3fff << 32 | 7 << 49 | 3 << 62;

impl Descriptor {
    /// Reads the fields.
    pub fn new(bits: u64) -> Descriptor {
        let length = |shift: u32| (bits >> shift & 0x3fff) as u32 * 16;
        Descriptor {
            start: length(0),
            leading: length(16),
            stride: length(32),
            base_offset: (bits >> 49 & 7) as u8,
            swizzle: [Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32][(bits >> 62) as usize],
            reserved: bits & !FIELDS,
        }
    }

    /// Distance of two neighbouring atoms along the dimension that is not K, and along K. An atom is the smallest piece that
    /// repeats: 8 elements of the dimension that is not contiguous by a row of the pattern.
    fn strides(&self, major: Major) -> (u32, u32) {
        match (major, self.swizzle) {
            (_, Swizzle::None) => (self.stride, self.leading),
            // Sixteen elements along K fit one row: neighbouring units are 16 bytes apart, and the offset is not used.
            (Major::K, _) => (self.stride, 16),
            (Major::Mn, _) => (self.leading, self.stride),
        }
    }

    /// Address of eight 16-bit elements that lie side by side: those with number `8 mn + 0..8` at `k` (MN-major), or
    /// `8 k + 0..8` at `mn` (K-major).
    pub fn unit(&self, major: Major, mn: u32, k: u32) -> u32 {
        let row = self.swizzle.row_bytes();
        let (along_mn, along_k) = self.strides(major);
        let offset = match major {
            Major::K => mn / 8 * along_mn + mn % 8 * row + k * along_k,
            Major::Mn => {
                let units = row / 16;
                mn / units * along_mn + mn % units * 16 + k / 8 * along_k + k % 8 * row
            }
        };
        self.swizzle.apply(self.start.wrapping_add(offset))
    }

    /// Address of one 16-bit element.
    pub fn element(&self, major: Major, mn: u32, k: u32) -> u32 {
        match major {
            Major::K => self.unit(major, mn, k / 8) + k % 8 * 2,
            Major::Mn => self.unit(major, mn / 8, k) + mn % 8 * 2,
        }
    }

    /// Checks the descriptor of an operand with `rows` elements in the dimension that is not K, and sixteen along K.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self, major: Major, rows: u32) -> Result<(), String> {
        let Descriptor { start, swizzle, base_offset, reserved, .. } = *self;
        let pattern = swizzle.pattern_bytes();
        let row = swizzle.row_bytes();
        if reserved != 0 {
            return Err(format!("reserved bits {reserved:#x} of the descriptor are set"));
        }
        if base_offset != 0 {
            return Err(format!("base offset {base_offset}, expected 0: matrices must begin where a pattern begins"));
        }
        // A step along K moves the start within the pattern's first row.
        if swizzle != Swizzle::None && start % pattern >= row {
            return Err(format!(
                "the matrix starts at {start:#x}, {} bytes into a pattern of {pattern} bytes: expected a multiple of {pattern}",
                start % pattern
            ));
        }
        if swizzle != Swizzle::None && major == Major::K && start % row + 32 > row {
            return Err(format!(
                "sixteen elements along K from {start:#x} leave the row of {row} bytes of the swizzling mode"
            ));
        }
        if swizzle != Swizzle::None && major == Major::Mn && start % pattern != 0 {
            return Err(format!(
                "the matrix starts at {start:#x}, expected a multiple of {pattern} when K is not contiguous"
            ));
        }
        self.check_strides(major, rows)
    }

    /// No two atoms may share memory, and swizzled ones must each begin with the pattern.
    fn check_strides(&self, major: Major, rows: u32) -> Result<(), String> {
        let pattern = self.swizzle.pattern_bytes();
        let (along_mn, along_k) = self.strides(major);
        let (name_mn, name_k) = match (major, self.swizzle) {
            (Major::Mn, Swizzle::B32 | Swizzle::B64 | Swizzle::B128) => ("leading dimension", "stride dimension"),
            _ => ("stride dimension", "leading dimension"),
        };
        let atoms_mn = match major {
            Major::K => rows / 8,
            Major::Mn => rows.div_ceil(self.swizzle.row_bytes() / 2),
        };
        let k_in_row = major == Major::K && self.swizzle != Swizzle::None;
        let used = [(name_mn, along_mn, atoms_mn > 1), (name_k, along_k, !k_in_row)];
        for (name, bytes, used) in used {
            if used && !bytes.is_multiple_of(pattern) && self.swizzle != Swizzle::None {
                return Err(format!(
                    "{name} byte offset {bytes}, expected a multiple of the pattern's {pattern} bytes"
                ));
            }
            if used && bytes < pattern {
                return Err(format!("{name} byte offset {bytes}, where one piece of the matrix has {pattern} bytes"));
            }
        }
        let overlaps = |atom: &u32| (atom * along_mn).abs_diff(along_k) < pattern;
        if !k_in_row && let Some(atom) = (0..atoms_mn).find(overlaps) {
            return Err(format!(
                "piece {atom} and the second one along K overlap: {name_mn} byte offset {along_mn}, {name_k} {along_k}"
            ));
        }
        Ok(())
    }
}

/// Row and column of element `i` of the accumulator of `wgmma` in thread `thread` of its warpgroup.
pub fn accumulator(thread: u32, i: u32) -> (u32, u32) {
    let (warp, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
    (16 * warp + g + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * t + (i & 1))
}

/// Row and K of element `i` of A in registers, in thread `thread` of its warpgroup.
pub fn operand_a(thread: u32, i: u32) -> (u32, u32) {
    accumulator(thread, i)
}

/// Row and column, within an 8 x 8 matrix, of what `ldmatrix` and `stmatrix` keep in the lower (0) or upper (1) half of a
/// register.
pub fn matrix(lane: u32, half: u32, trans: bool) -> (u32, u32) {
    let (row, column) = (lane / 4, lane % 4 * 2 + half);
    if trans { (column, row) } else { (row, column) }
}

/// Row and K of half `half` of register `register` of A in `mma.m16n8k16`.
pub fn mma_a(lane: u32, register: u32, half: u32) -> (u32, u32) {
    (lane / 4 + 8 * (register & 1), lane % 4 * 2 + half + 8 * (register >> 1))
}

/// K and column of half `half` of register `register` of B in `mma.m16n8k16`.
pub fn mma_b(lane: u32, register: u32, half: u32) -> (u32, u32) {
    (lane % 4 * 2 + half + 8 * register, lane / 4)
}

/// Row and column of accumulator `i` of `mma.m16n8k16`.
pub fn mma_c(lane: u32, i: u32) -> (u32, u32) {
    (lane / 4 + 8 * (i >> 1), lane % 4 * 2 + (i & 1))
}
