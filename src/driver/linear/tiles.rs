//! Quantised weights in the order in which the kernels read them.
//!
//! A tile holds 16 rows of a matrix, so that a vector register holds the same few elements of 16 rows and its lanes are 16
//! outputs. Elements keep the bits that they have in the file; only their order changes. Along the columns, a tile is a
//! sequence of blocks:
//!
//! ```text
//! d       16 x f16                        the block's scale, a row after another
//! m       16 x f16                        if the type has minima
//! scales  16 x i8 for each run            if the block has 256 elements
//! mins    16 x i8 for each run            if it has minima too
//! for each group of 32 elements:
//!   low   low_bits x 64 bytes             planes of bits
//!   high  high_bits x 64 bytes
//! ```
//! Unpacked, a group is eight vectors of 64 bytes. Byte `4 r + c` of vector `j` is element `4 j + c` of row `r`. A plane
//! of `b` bits is `b` vectors; vector `i` of it holds the bits of the unpacked vectors `i`, `i + b`, `i + 2 b`, ...,
//! from its low bits to its high bits.
//!
//! Rows beyond the last are zeros.

use half::f16;
use rayon::prelude::*;

use crate::driver::quant::{Block, Format, GROUP, TensorType};

/// Rows in a tile.
pub(super) const ROWS: usize = 16;
/// Bytes in an unpacked vector: four elements of every row.
pub(super) const VECTOR: usize = 4 * ROWS;
/// Vectors in a group.
pub(super) const VECTORS: usize = GROUP / 4;

/// The offsets in a tile's block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub m: usize,
    pub scales: usize,
    pub mins: usize,
    pub groups: usize,
    /// The bytes of a group; its high plane begins at `high`.
    pub group: usize,
    pub high: usize,
    /// The bytes of the block.
    pub block: usize,
}

impl Places {
    pub(super) const fn of(format: &Format) -> Self {
        let has_mins = format.zero.is_none();
        let runs = if format.groups == 1 { 0 } else { format.groups * format.runs };
        let m = 2 * ROWS;
        let scales = if has_mins { 2 * m } else { m };
        let mins = scales + runs * ROWS;
        let groups = if has_mins { mins + runs * ROWS } else { mins };
        let high = format.low_bits * VECTOR;
        let group = high + format.high_bits * VECTOR;
        Self { m, scales, mins, groups, group, high, block: groups + format.groups * group }
    }
}

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix of quantised weights, in tiles.
#[derive(Debug, Clone)]
pub(super) struct Tiles {
    ty: TensorType,
    rows: usize,
    /// Blocks along the columns.
    blocks: usize,
    /// Whole tiles; the last line may be longer than the last tile.
    lines: Vec<Line>,
}

impl Tiles {
    /// Takes the rows of a matrix as a file stores them: `blocks` blocks of a quantised type each.
    ///
    /// # Panics
    /// If `data` has another size.
    pub(super) fn pack(ty: TensorType, rows: usize, blocks: usize, data: &[u8]) -> Self {
        let row_bytes = blocks * ty.block_bytes();
        assert_eq!(data.len(), rows * row_bytes, "bytes of {rows} rows of {blocks} blocks");
        let mut tiles = Self { ty, rows, blocks, lines: Vec::new() };
        let bytes = tiles.count() * tiles.tile_bytes();
        tiles.lines = vec![Line([0; 64]); bytes.div_ceil(64)];
        if bytes == 0 {
            return tiles;
        }
        let tile_bytes = tiles.tile_bytes();
        tiles.bytes_mut()[..bytes].par_chunks_exact_mut(tile_bytes).zip(data.par_chunks(ROWS * row_bytes)).for_each(
            |(tile, data)| {
                for (r, row) in data.chunks_exact(row_bytes).enumerate() {
                    put_row(ty, r, row, tile);
                }
            },
        );
        tiles
    }

    pub(super) fn ty(&self) -> TensorType {
        self.ty
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Groups along the columns.
    pub(super) fn groups(&self) -> usize {
        self.blocks * self.ty.format().groups
    }

    /// The number of tiles.
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The bytes of a tile.
    pub(super) fn tile_bytes(&self) -> usize {
        self.blocks * Places::of(&self.ty.format()).block
    }

    /// The memory held.
    pub(super) fn memory(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: a line is 64 bytes without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), 64 * self.lines.len()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: a line is 64 bytes without padding, and every value of them is valid.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), 64 * self.lines.len()) }
    }

    /// One row in f32, with the bits of [`dequantize`](crate::driver::quant::dequantize).
    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let format = self.ty.format();
        let places = Places::of(&format);
        let r = i % ROWS;
        let tile = &self.bytes()[i / ROWS * self.tile_bytes()..][..self.tile_bytes()];
        let blocks = tile.chunks_exact(places.block).zip(out.chunks_exact_mut(self.ty.block_elements()));
        for (block, out) in blocks {
            let half = |at: usize| f16::from_le_bytes([block[at + 2 * r], block[at + 2 * r + 1]]).to_f32();
            let byte = |at: usize, run: usize| f32::from(block[at + run * ROWS + r] as i8);
            let (d, m) = (half(0), if format.zero.is_none() { half(places.m) } else { 0.0 });
            for (run, out) in out.chunks_exact_mut(format.run()).enumerate() {
                let (scale, min) = match format.groups {
                    1 => (d, m),
                    _ if format.zero.is_some() => (d * byte(places.scales, run), 0.0),
                    _ => (d * byte(places.scales, run), -(m * byte(places.mins, run))),
                };
                let group = &block[places.groups + run / format.runs * places.group..][..places.group];
                for (i, out) in out.iter_mut().enumerate() {
                    let e = run % format.runs * format.run() + i;
                    let (j, at) = (e / 4, 4 * r + e % 4);
                    let bits = |plane: &[u8], bits: usize| match bits {
                        0 => 0,
                        _ => plane[j % bits * VECTOR + at] >> (j / bits * bits) & ((1u32 << bits) - 1) as u8,
                    };
                    let (low, high) = group.split_at(places.high);
                    let q = bits(low, format.low_bits) | bits(high, format.high_bits) << (format.low_bits % 8);
                    *out = format.value(q, scale, min);
                }
            }
        }
    }
}

/// Puts row `r` of a tile in its place; the tile was zeros.
fn put_row(ty: TensorType, r: usize, row: &[u8], tile: &mut [u8]) {
    let format = ty.format();
    let places = Places::of(&format);
    let mut block = Block::default();
    for (b, out) in row.chunks_exact(ty.block_bytes()).zip(tile.chunks_exact_mut(places.block)) {
        block.read(ty, b);
        out[2 * r..][..2].copy_from_slice(&block.d);
        if format.zero.is_none() {
            out[places.m + 2 * r..][..2].copy_from_slice(&block.m);
        }
        if format.groups > 1 {
            for run in 0..format.groups * format.runs {
                out[places.scales + run * ROWS + r] = block.scales[run] as u8;
                if format.zero.is_none() {
                    out[places.mins + run * ROWS + r] = block.mins[run] as u8;
                }
            }
        }
        let groups = out[places.groups..].chunks_exact_mut(places.group).zip(block.q.as_chunks::<GROUP>().0);
        for (group, q) in groups {
            let (low, high) = group.split_at_mut(places.high);
            put_plane(low, format.low_bits, 0, r, q);
            put_plane(high, format.high_bits, format.low_bits, r, q);
        }
    }
}

/// Puts the `bits` bits from bit `from` on of a row's group into a plane.
fn put_plane(plane: &mut [u8], bits: usize, from: usize, r: usize, q: &[u8; GROUP]) {
    match bits {
        0 => (),
        1 => put_bits::<1>(plane, from, r, q),
        2 => put_bits::<2>(plane, from, r, q),
        4 => put_bits::<4>(plane, from, r, q),
        _ => put_bits::<8>(plane, from, r, q),
    }
}

/// As [`put_plane`], four elements at a time: no shift moves a bit that counts into another byte.
fn put_bits<const BITS: usize>(plane: &mut [u8], from: usize, r: usize, q: &[u8; GROUP]) {
    let mask = u32::from_ne_bytes([((1u32 << BITS) - 1) as u8; 4]);
    for (j, q) in q.as_chunks::<4>().0.iter().enumerate() {
        let out = &mut plane[j % BITS * VECTOR + 4 * r..][..4];
        let bits = (u32::from_le_bytes(*q) >> from & mask) << (j / BITS * BITS);
        for (out, bits) in out.iter_mut().zip(bits.to_le_bytes()) {
            *out |= bits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::quant::dequantize;

    #[test]
    fn rows_have_the_bits_of_the_file() {
        for ty in super::super::tests::quantised() {
            for (rows, blocks) in [(1, 1), (16, 2), (37, 3)] {
                let data = super::super::tests::random_blocks(ty, rows * blocks, 7);
                let tiles = Tiles::pack(ty, rows, blocks, &data);
                let cols = blocks * ty.block_elements();
                let mut want = vec![0.0; rows * cols];
                dequantize(ty, &data, &mut want).unwrap();
                let mut got = vec![f32::NAN; cols];
                for (i, want) in want.chunks_exact(cols).enumerate() {
                    tiles.row(i, &mut got);
                    let same = got.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} row {i} of {rows}", ty.name());
                }
            }
        }
    }
}
