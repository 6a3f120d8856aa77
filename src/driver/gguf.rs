//! The GGUF container: a header, key/value metadata, tensor descriptions, then the tensors themselves.
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | pairs u64
//! pairs   x { key: string, type u32, value }                   string = length u64, bytes
//! tensors x { name: string, rank u32, extents u64 x rank (fastest first), ggml type u32, offset u64 }
//! padding to `general.alignment` (32 unless given), then the data that the offsets count from
//! ```
//!
//! No number in the file is trusted. A count is compared with the remaining bytes before memory is reserved for it, so
//! that the reader allocates at most a small multiple of the file's size. Sums and products are checked. A tensor must
//! lie inside the file and must not overlap another, so that the file's size also bounds the unpacked weights.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::Path;

use memmap2::Mmap;

use super::error::{Error, Result};
use super::files;
use super::quant::{Tensor, TensorType};

/// The highest rank of a ggml tensor.
const MAX_RANK: u32 = 4;
/// The format's limit for keys, applied to tensor names as well.
const MAX_NAME: usize = 65_535;
/// The format allows arrays of arrays and sets no limit; no known file nests them at all.
const MAX_NESTING: usize = 4;
const DEFAULT_ALIGNMENT: usize = 32;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    String(String),
    /// An array of one element type.
    Array(Array),
}

/// An array of metadata values, at the width that it has in the file, because a vocabulary can have millions of
/// entries.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// Unsigned 16-bit integers.
    U16(Vec<u16>),
    /// Signed 16-bit integers.
    I16(Vec<i16>),
    /// Unsigned 32-bit integers.
    U32(Vec<u32>),
    /// Signed 32-bit integers.
    I32(Vec<i32>),
    /// Unsigned 64-bit integers.
    U64(Vec<u64>),
    /// Signed 64-bit integers.
    I64(Vec<i64>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// Strings.
    String(Vec<String>),
    /// Arrays, which may differ in type.
    Array(Vec<Array>),
}

impl Array {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::Array(v) => v.len(),
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Value {
    /// The value as an unsigned integer, if it is a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(v) => Some(v),
            Self::Signed(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// The value as a float, if it is a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Float(v) => Some(v),
            Self::Unsigned(v) => Some(v as f64),
            Self::Signed(v) => Some(v as f64),
            _ => None,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) => "an unsigned integer",
            Self::Signed(_) => "a signed integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
        }
    }
}

/// The description of one tensor.
#[derive(Debug, Clone)]
struct Info {
    name: String,
    ty: TensorType,
    /// Slowest first, the reverse of the file's order.
    shape: Vec<usize>,
    /// From the start of the file.
    start: usize,
    bytes: usize,
}

enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(m) => m,
            Self::Owned(v) => v,
            Self::Static(s) => s,
        }
    }
}

/// An open GGUF file. Tensors are slices of the mapping; they are not copied.
pub struct Gguf {
    bytes: Bytes,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<Info>,
    by_name: HashMap<String, usize>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("version", &self.version)
            .field("bytes", &self.bytes.len())
            .field("metadata", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

impl Gguf {
    /// Maps and reads a file. The file must not be changed or shortened while it is open.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        Self::parse(Bytes::Mapped(map)).map_err(|e| e.context(path.display()))
    }

    /// Reads a file that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::parse(Bytes::Owned(bytes))
    }

    /// Reads a file that is part of the program.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        Self::parse(Bytes::Static(bytes))
    }

    fn parse(bytes: Bytes) -> Result<Self> {
        let mut r = Reader { bytes: &bytes, at: 0 };
        let magic = r.take(4, "the magic number")?;
        if magic != b"GGUF" {
            return Err(Error::malformed(format!("not a GGUF file: it begins with the bytes {magic:02x?}")));
        }
        let version = r.u32("the version")?;
        if version.swap_bytes() <= 3 && version != 0 {
            return Err(Error::unsupported("a big-endian GGUF file; only little-endian ones can be read"));
        }
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("GGUF version {version}; versions 2 and 3 can be read")));
        }
        // The least bytes of a tensor description (empty name, rank 1) and of a pair (empty key, one byte).
        let tensor_count = r.count(8 + 4 + 8 + 4 + 8, "tensors")?;
        let pair_count = r.count(8 + 4 + 1, "metadata pairs")?;

        let mut metadata = BTreeMap::new();
        for i in 0..pair_count {
            let key = r.name(format_args!("the key of metadata pair {i}"))?;
            let ty = r.u32(&key)?;
            let value = r.value(ty, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::malformed(format!("metadata key {key:?} appears twice")));
            }
        }

        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(v) => v
                .as_u64()
                .and_then(|v| usize::try_from(v).ok())
                .filter(|v| v.is_power_of_two())
                .ok_or_else(|| Error::malformed(format!("general.alignment is {v:?}, not a power of two")))?,
        };

        let mut infos = Vec::with_capacity(tensor_count);
        for i in 0..tensor_count {
            infos.push(r.tensor_info(i, alignment)?);
        }
        let data_start = r
            .at
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| Error::malformed(format!("an alignment of {alignment} bytes leaves no room for data")))?;

        let mut tensors = Vec::with_capacity(infos.len());
        let mut by_name = HashMap::with_capacity(infos.len());
        for (name, ty, shape, offset, size) in infos {
            let start = data_start.checked_add(offset);
            let end = start.and_then(|s| s.checked_add(size));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(Error::malformed(format!("tensor {name:?}: offset {offset} plus {size} bytes overflows")));
            };
            if end > bytes.len() {
                return Err(Error::malformed(format!(
                    "tensor {name:?} ends at byte {end}, but the file has {} bytes; it is truncated or corrupt",
                    bytes.len()
                )));
            }
            if by_name.insert(name.clone(), tensors.len()).is_some() {
                return Err(Error::malformed(format!("tensor {name:?} appears twice")));
            }
            tensors.push(Info { name, ty, shape, start, bytes: size });
        }
        reject_overlap(&tensors)?;
        Ok(Self { bytes, version, metadata, tensors, by_name })
    }

    /// The version of the container format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.tensors.iter().map(|i| self.view(i))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.by_name.get(name).map(|&i| self.view(&self.tensors[i]))
    }

    fn view<'a>(&'a self, i: &'a Info) -> Tensor<'a> {
        Tensor { name: &i.name, ty: i.ty, shape: i.shape.clone(), data: &self.bytes[i.start..i.start + i.bytes] }
    }

    /// A non-negative integer that may be missing.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |v| v.as_u64().and_then(|v| usize::try_from(v).ok()))
    }

    /// A number that may be missing.
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A boolean that may be missing.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// A string that may be missing.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    /// An array that may be missing.
    pub fn opt_array(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "an array", |v| if let Value::Array(a) = v { Some(a) } else { None })
    }

    /// A non-negative integer; an error if it is missing.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.opt_usize(key)?.ok_or_else(|| missing(key))
    }

    /// A string; an error if it is missing.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.opt_str(key)?.ok_or_else(|| missing(key))
    }

    fn typed<'a, T>(&'a self, key: &str, want: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(v) = self.metadata.get(key) else {
            return Ok(None);
        };
        match get(v) {
            Some(t) => Ok(Some(t)),
            None => Err(Error::malformed(format!("metadata {key:?} is {}, where {want} belongs", v.kind()))),
        }
    }
}

fn missing(key: &str) -> Error {
    Error::malformed(format!("metadata {key:?} is missing"))
}

/// Overlapping tensors are an error, because they would let a small file unpack to any size.
fn reject_overlap(tensors: &[Info]) -> Result<()> {
    let mut order: Vec<&Info> = tensors.iter().collect();
    order.sort_by_key(|i| i.start);
    for pair in order.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        if a.start + a.bytes > b.start {
            return Err(Error::malformed(format!(
                "tensors {:?} and {:?} overlap: one ends at byte {}, the other starts at byte {}",
                a.name,
                b.name,
                a.start + a.bytes,
                b.start
            )));
        }
    }
    Ok(())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type RawInfo = (String, TensorType, Vec<usize>, usize, usize);

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: impl Display) -> Result<&'a [u8]> {
        if n > self.left() {
            return Err(Error::malformed(format!(
                "{what} needs {n} bytes at byte {}, but only {} are left; the file is truncated or corrupt",
                self.at,
                self.left()
            )));
        }
        let s = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(s)
    }

    fn fixed<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: impl Display) -> Result<u32> {
        Ok(u32::from_le_bytes(self.fixed(what)?))
    }

    fn u64(&mut self, what: impl Display) -> Result<u64> {
        Ok(u64::from_le_bytes(self.fixed(what)?))
    }

    /// A count of items of at least `least` bytes each.
    fn count(&mut self, least: usize, what: impl Display) -> Result<usize> {
        let n = self.u64(&what)?;
        let room = self.left() / least;
        match usize::try_from(n) {
            Ok(n) if n <= room => Ok(n),
            _ => Err(Error::malformed(format!(
                "{n} {what} are announced at byte {}, but the {} bytes left hold at most {room}",
                self.at - 8,
                self.left()
            ))),
        }
    }

    fn string(&mut self, what: impl Display) -> Result<&'a str> {
        let n = self.count(1, format_args!("bytes of {what}"))?;
        let start = self.at;
        std::str::from_utf8(self.take(n, &what)?)
            .map_err(|e| Error::malformed(format!("{what} at byte {start} is not UTF-8: {e}")))
    }

    fn name(&mut self, what: impl Display) -> Result<String> {
        let s = self.string(&what)?;
        if s.is_empty() || s.len() > MAX_NAME {
            return Err(Error::malformed(format!("{what} has {} bytes; 1 to {MAX_NAME} are allowed", s.len())));
        }
        Ok(s.to_owned())
    }

    fn bool(&mut self, what: impl Display) -> Result<bool> {
        match self.fixed::<1>(&what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [v] => Err(Error::malformed(format!("{what}: a bool must be 0 or 1, not {v}"))),
        }
    }

    fn value(&mut self, ty: u32, key: &str) -> Result<Value> {
        Ok(match ty {
            0 => Value::Unsigned(u8::from_le_bytes(self.fixed(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.fixed(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.fixed(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.fixed(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.fixed(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.fixed(key)?).into()),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key)?.to_owned()),
            9 => Value::Array(self.array(key, 0)?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.fixed(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.fixed(key)?)),
            _ => {
                return Err(Error::malformed(format!("metadata {key:?} has type {ty}; types are 0 to 12")));
            }
        })
    }

    fn numbers<const N: usize, T>(&mut self, key: &str, from: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let n = self.count(N, format_args!("elements of {key:?}"))?;
        let (chunks, _) = self.take(n * N, key)?.as_chunks::<N>();
        Ok(chunks.iter().map(|&c| from(c)).collect())
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array> {
        Ok(match self.u32(key)? {
            0 => Array::U8(self.numbers(key, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(key, f32::from_le_bytes)?),
            7 => {
                let n = self.count(1, format_args!("elements of {key:?}"))?;
                Array::Bool((0..n).map(|_| self.bool(key)).collect::<Result<_>>()?)
            }
            8 => {
                let n = self.count(8, format_args!("elements of {key:?}"))?;
                Array::String((0..n).map(|_| self.string(key).map(str::to_owned)).collect::<Result<_>>()?)
            }
            9 if depth + 1 < MAX_NESTING => {
                let n = self.count(4 + 8, format_args!("elements of {key:?}"))?;
                Array::Array((0..n).map(|_| self.array(key, depth + 1)).collect::<Result<_>>()?)
            }
            9 => {
                return Err(Error::malformed(format!("metadata {key:?} nests arrays more than {MAX_NESTING} deep")));
            }
            10 => Array::U64(self.numbers(key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(key, f64::from_le_bytes)?),
            ty => {
                return Err(Error::malformed(format!("metadata {key:?} is an array of type {ty}; types are 0 to 12")));
            }
        })
    }

    fn tensor_info(&mut self, i: usize, alignment: usize) -> Result<RawInfo> {
        let name = self.name(format_args!("the name of tensor {i}"))?;
        let rank = self.u32(&name)?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(Error::malformed(format!("tensor {name:?} has rank {rank}; ranks are 1 to {MAX_RANK}")));
        }
        let mut shape = Vec::with_capacity(rank as usize);
        let mut elements = 1usize;
        for _ in 0..rank {
            let extent = self.u64(&name)?;
            elements =
                usize::try_from(extent).ok().filter(|&e| e > 0).and_then(|e| elements.checked_mul(e)).ok_or_else(
                    || {
                        Error::malformed(format!(
                            "tensor {name:?} has an extent of {extent} after {shape:?} (fastest first)"
                        ))
                    },
                )?;
            shape.push(extent as usize);
        }
        let id = self.u32(&name)?;
        let ty = TensorType::from_ggml(id)
            .ok_or_else(|| Error::unsupported(format!("tensor {name:?} has ggml type {id}, which cannot be read")))?;
        if !shape[0].is_multiple_of(ty.block_elements()) {
            return Err(Error::malformed(format!(
                "tensor {name:?} has rows of {} elements, not a multiple of the {} in a {} block",
                shape[0],
                ty.block_elements(),
                ty.name()
            )));
        }
        let size = ty
            .bytes(elements)
            .ok_or_else(|| Error::malformed(format!("tensor {name:?}: {elements} elements of {}", ty.name())))?;
        let offset = self.u64(&name)?;
        let offset = usize::try_from(offset).ok().filter(|o| o.is_multiple_of(alignment)).ok_or_else(|| {
            Error::malformed(format!("tensor {name:?} has offset {offset}, not a multiple of {alignment}"))
        })?;
        shape.reverse();
        Ok((name, ty, shape, offset, size))
    }
}
