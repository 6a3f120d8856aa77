//! The context: the choice of a kernel for each operation.

use crate::dtype::DType;
use crate::error::Result;
use crate::format::CacheFormat;
use crate::isa::Isa;
use crate::kernels::api::{
    AnglesFn, AttentionKernel, CopyFn, Function, HadamardFn, KernelInfo, MergeFn, NormFn, Op, Precision, RopeFn,
    ScaledFn,
};
use crate::kernels::registry::{self, Entry};
use crate::layout::Packing;
use crate::tuning::Tuning;
use std::sync::Arc;

const FORMATS: usize = CacheFormat::ALL.len();

/// The kernels chosen for this machine. A context is immutable and can be shared between threads.
///
/// The ceiling is the level given, lowered by `KVLANE_MAX_ISA` if that is set; both can only lower. For each operation
/// and pair of types, the context takes the kernel of the preferred level among those that are available and have no
/// feature beyond the ceiling's. A ceiling that is available is preferred to the levels below it. Other levels serve operations that
/// a partial level lacks.
///
/// ```
/// use kvlane::{Context, DType, Isa, Op};
/// let best = Context::new()?;
/// let portable = Context::with_max_isa(Isa::Scalar)?;
/// assert_eq!(portable.kernel(Op::Attention, DType::F16, DType::F16).unwrap().name, "attention_f16_scalar");
/// println!("{}", best.kernel(Op::Attention, DType::F16, DType::F16).unwrap().name);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone)]
pub struct Context {
    isa: Isa,
    /// By precision, operation, source and target; see [`slot`]. On the heap: a copy would take a good part of a small stack.
    table: Arc<[Option<&'static Entry>]>,
    /// Attention by format, of the preferred level that is not partial.
    full: [Option<&'static Entry>; FORMATS],
    saturates_f16: bool,
    tuning: Tuning,
}

/// The places of a precision in a context's table.
const KERNELS: usize = Op::ALL.len() * FORMATS * FORMATS;

/// The place of a kernel in a context's table.
fn slot(precision: Precision, op: Op, src: CacheFormat, dst: CacheFormat) -> usize {
    precision as usize * KERNELS + (op as usize * FORMATS + src.index()) * FORMATS + dst.index()
}

impl Context {
    /// Takes the best level that is available and that `KVLANE_MAX_ISA` allows.
    ///
    /// # Errors
    /// `KVLANE_MAX_ISA` is not a level, or is a level of another architecture.
    pub fn new() -> Result<Self> {
        Self::up_to(None)
    }

    /// Takes the preferred level of those that are available, have no feature beyond those of `ceiling`, and are allowed by
    /// `KVLANE_MAX_ISA`.
    ///
    /// # Errors
    /// `ceiling` or `KVLANE_MAX_ISA` is a level of another architecture, or `KVLANE_MAX_ISA` is not a level.
    pub fn with_max_isa(ceiling: Isa) -> Result<Self> {
        Self::up_to(Some(ceiling))
    }

    fn up_to(ceiling: Option<Isa>) -> Result<Self> {
        let ceilings: Vec<Isa> = ceiling.into_iter().chain(Isa::ceiling_from_env()?).collect();
        let isa = Isa::best_within(&ceilings)?;
        let full_level = Isa::ALL
            .into_iter()
            .filter(|level| !level.is_partial() && level.is_within(isa) && level.is_available())
            .max_by_key(|level| level.priority_within(isa));
        let mut table: Vec<Option<&'static Entry>> = vec![None; Precision::ALL.len() * KERNELS];
        for entry in registry::entries() {
            let info = &entry.info;
            if !info.isa.is_within(isa) || !info.isa.is_available() {
                continue;
            }
            // Kernels of integer products at a full level read queries as the rest of its kernels do.
            let integer = info.precision == Some(Precision::Integer);
            if integer && !info.isa.is_partial() && Some(info.isa) != full_level {
                continue;
            }
            // What has no kernel of integer products is served as by default.
            let serves = |p| info.precision.map_or(p != Precision::Integer, |own| own == p);
            for precision in Precision::ALL.into_iter().filter(|&p| serves(p)) {
                let slot = &mut table[slot(precision, info.op, info.src, info.dst)];
                if slot.is_none_or(|other| other.info.isa.priority_within(isa) < info.isa.priority_within(isa)) {
                    *slot = Some(entry);
                }
            }
        }
        for i in 0..KERNELS {
            let [default, integer] = [Precision::Default, Precision::Integer].map(|p| p as usize * KERNELS + i);
            table[integer] = table[integer].or(table[default]);
        }
        let mut full: [Option<&'static Entry>; FORMATS] = [None; FORMATS];
        for entry in registry::entries() {
            let info = &entry.info;
            if info.op == Op::Attention && info.precision.is_none() && Some(info.isa) == full_level {
                full[info.src.index()] = Some(entry);
            }
        }
        Ok(Self { isa, table: table.into(), full, saturates_f16: false, tuning: Tuning::of_this_cpu(isa) })
    }

    /// Whether operations that convert to f16 saturate. A number beyond 65504, the largest finite f16, otherwise becomes an
    /// infinity, as IEEE 754 rounds it, and the softmax of a row that meets it in the cache becomes NaN. With this option it
    /// becomes 65504 with its sign; infinities do too, and NaN stays NaN.
    ///
    /// The option holds for [`rope`](crate::rope()), [`rms_norm`](crate::rms_norm), [`hadamard`](crate::hadamard),
    /// [`kv_write`](crate::kv_write) and the operations of a [`KvCache`](crate::KvCache). What is f16 already is copied with all its
    /// bits. Outputs of attention and of [`merge_states`](crate::merge_states) are means of values, and are rounded.
    ///
    /// ```
    /// use kvlane::*;
    /// let context = Context::new()?.saturate_f16(true);
    /// let (k, mut keys) = ([1e6f32, -1e6, f32::INFINITY, 1.0], [half::f16::ZERO; 4]);
    /// let (v, mut values) = ([0f32; 4], [half::f16::ZERO; 4]);
    /// let shape = [1, 1, 1, 4];
    /// let (k, v) = (View::new(&k, shape)?, View::new(&v, shape)?);
    /// let (k_cache, v_cache) = (ViewMut::new(&mut keys, shape)?, ViewMut::new(&mut values, shape)?);
    /// kv_write(&context, &Serial, KvWrite::new(k, v, k_cache, v_cache, Destination::positions(&[0])))?;
    /// assert_eq!(keys.map(f32::from), [65504.0, -65504.0, 65504.0, 1.0]);
    /// # Ok::<(), kvlane::Error>(())
    /// ```
    #[must_use]
    pub fn saturate_f16(mut self, saturate: bool) -> Self {
        self.saturates_f16 = saturate;
        self
    }

    /// Whether operations that convert to f16 [saturate](Self::saturate_f16).
    pub fn saturates_f16(&self) -> bool {
        self.saturates_f16
    }

    /// How attention prefetches and reads: that of this CPU, or what [`Self::tuned`] set.
    pub fn tuning(&self) -> Tuning {
        self.tuning
    }

    /// Sets how attention prefetches and reads. No bit of a result depends on it.
    #[must_use]
    pub fn tuned(mut self, tuning: Tuning) -> Self {
        self.tuning = tuning;
        self
    }

    /// The level in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The kernel that serves an operation from one type to another; `None` if the operation has no such pair.
    ///
    /// For [`Op::Attention`] both are the format of K, or of V: see [`Self::attention_kernels`] for a call. For [`Op::RopeAngles`]
    /// both are f32.
    pub fn kernel(&self, op: Op, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> Option<KernelInfo> {
        self.kernel_for(op, src, dst, Precision::Default)
    }

    /// As [`Self::kernel`], for calls with a precision. [`KernelInfo::precision`] is set for kernels that serve only
    /// one.
    pub fn kernel_for(
        &self,
        op: Op,
        src: impl Into<CacheFormat>,
        dst: impl Into<CacheFormat>,
        precision: Precision,
    ) -> Option<KernelInfo> {
        self.entry(op, src.into(), dst.into(), precision).map(|entry| entry.info)
    }

    /// The kernels that serve attention over keys of one format and values of another: the one whose way with keys is used, and
    /// the one whose way with values is. Both are of one level, and the same where the formats are.
    ///
    /// A level that is [partial](Isa::is_partial) serves a pair of formats as a whole or not at all; except that kernels of
    /// [`Precision::Integer`] are of the level of their keys, and go with values of that level, or of one with the features of the other, or
    /// of the full level below.
    pub fn attention_kernels(
        &self,
        k_format: impl Into<CacheFormat>,
        v_format: impl Into<CacheFormat>,
        precision: Precision,
    ) -> [KernelInfo; 2] {
        self.attention_entries(k_format.into(), v_format.into(), precision).map(|entry| entry.info)
    }

    fn attention_entries(&self, k: CacheFormat, v: CacheFormat, precision: Precision) -> [&'static Entry; 2] {
        let [keys, values] = [k, v].map(|format| match self.entry(Op::Attention, format, format, precision) {
            Some(entry) => entry,
            None => unreachable!("every full level has attention over {format}"),
        });
        let [integer, of_values] = [keys, values].map(|entry| entry.info.precision == Some(Precision::Integer));
        if k == v || !keys.info.isa.is_partial() && keys.info.isa == values.info.isa && (integer || !of_values) {
            return [keys, values];
        }
        let full = |format: CacheFormat| match self.full[format.index()] {
            Some(entry) => entry,
            None => unreachable!("every full level has attention over {format}"),
        };
        // Kernels of integer products say how keys are read. Values are read as at the full level, unless they have such kernels too.
        let joined = values.info.isa.is_within(keys.info.isa) || keys.info.isa.is_within(values.info.isa);
        let both = integer && of_values && joined;
        [if integer { keys } else { full(k) }, if both { values } else { full(v) }]
    }

    fn entry(&self, op: Op, src: CacheFormat, dst: CacheFormat, precision: Precision) -> Option<&'static Entry> {
        self.table[slot(precision, op, src, dst)]
    }

    /// The best packing of values of a format for the attention kernels in use: [row pairs](Packing::RowPairs) if they
    /// multiply tiles of bf16, otherwise [rows](Packing::Rows). Every packing of plain elements works at every level;
    /// quantised values are never packed.
    pub fn v_packing(&self, format: impl Into<CacheFormat>) -> Packing {
        let format = format.into();
        match self.kernel(Op::Attention, format, format) {
            Some(kernel) if format == CacheFormat::Bf16 && kernel.isa == Isa::Amx => Packing::RowPairs,
            _ => Packing::Rows,
        }
    }

    fn function(&self, op: Op, src: CacheFormat, dst: CacheFormat) -> &'static Function {
        match self.entry(op, src, dst, Precision::Default) {
            Some(entry) if self.saturates_f16 && dst == CacheFormat::F16 => {
                let mut kernels = registry::saturating(entry.info.isa).iter();
                let saturating = kernels.find(|(of, from, _)| (*of, *from) == (op, src));
                saturating.map_or(&entry.function, |(_, _, function)| function)
            }
            Some(entry) => &entry.function,
            // The scalar level has a kernel for every pair that operations use; see `tests::every_level_is_complete`.
            None => unreachable!("no kernel for {op:?} from {src} to {dst}"),
        }
    }

    pub(crate) fn angles(&self) -> AnglesFn {
        match self.function(Op::RopeAngles, CacheFormat::F32, CacheFormat::F32) {
            Function::Angles(f) => *f,
            _ => unreachable!("the registry files angles under RopeAngles"),
        }
    }

    pub(crate) fn rope(&self, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> RopeFn {
        match self.function(Op::Rope, src.into(), dst.into()) {
            Function::Rope(f) => *f,
            _ => unreachable!("the registry files RoPE under Rope"),
        }
    }

    pub(crate) fn copy(&self, op: Op, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> CopyFn {
        match self.function(op, src.into(), dst.into()) {
            Function::Copy(f) => *f,
            _ => unreachable!("the registry files copies under KvWrite and RepeatKv"),
        }
    }

    pub(crate) fn attention(&self, k: CacheFormat, v: CacheFormat, precision: Precision) -> AttentionKernel {
        let [keys, values] = self.attention_entries(k, v, precision).map(|entry| match entry.function {
            Function::Attention(fns) => fns,
            _ => unreachable!("the registry files attention under Attention"),
        });
        AttentionKernel::new(keys, values, self.tuning)
    }

    pub(crate) fn merge(&self, dtype: DType) -> MergeFn {
        match self.function(Op::MergeStates, dtype.into(), dtype.into()) {
            Function::Merge(f) => *f,
            _ => unreachable!("the registry files merges under MergeStates"),
        }
    }

    pub(crate) fn norm(&self, src: DType, dst: impl Into<CacheFormat>) -> NormFn {
        match self.function(Op::RmsNorm, src.into(), dst.into()) {
            Function::Norm(f) => *f,
            _ => unreachable!("the registry files norms under RmsNorm"),
        }
    }

    pub(crate) fn hadamard(&self, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> HadamardFn {
        match self.function(Op::Hadamard, src.into(), dst.into()) {
            Function::Hadamard(f) => *f,
            _ => unreachable!("the registry files Hadamard rotations under Hadamard"),
        }
    }

    /// From elements to quantised units and, where the format has them, scales.
    pub(crate) fn quantize(&self, src: DType, dst: CacheFormat) -> ScaledFn {
        self.scaled(Op::KvWrite, src.into(), dst)
    }

    /// From quantised units and scales to elements.
    pub(crate) fn dequantize(&self, src: CacheFormat, dst: DType) -> ScaledFn {
        self.scaled(Op::KvRead, src, dst.into())
    }

    fn scaled(&self, op: Op, src: CacheFormat, dst: CacheFormat) -> ScaledFn {
        match self.function(op, src, dst) {
            Function::Scaled(f) => *f,
            _ => unreachable!("the registry files kernels of quantised caches under KvWrite and KvRead"),
        }
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("isa", &self.isa).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_complete() {
        for level in Isa::ALL.into_iter().filter(|l| l.is_built()) {
            for op in Op::ALL {
                for src in CacheFormat::ALL {
                    for dst in CacheFormat::ALL {
                        let [from, to] = [src, dst].map(|format| format.dtype().is_some());
                        let wanted = match op {
                            Op::RopeAngles => src == DType::F32 && dst == DType::F32,
                            Op::Rope | Op::RmsNorm | Op::Hadamard => from && to,
                            Op::KvWrite => from,
                            Op::KvRead => !from && to,
                            Op::RepeatKv | Op::MergeStates => src == dst && from,
                            Op::Attention => src == dst,
                        };
                        for precision in Precision::ALL {
                            let found = registry::kernels()
                                .filter(|k| k.isa == level && k.op == op && k.src == src && k.dst == dst)
                                .filter(|k| k.precision.map_or(precision != Precision::Integer, |p| p == precision))
                                .count();
                            let most = usize::from(wanted);
                            let may_lack = level.is_partial() || precision == Precision::Integer;
                            let least = if may_lack { 0 } else { most };
                            assert!((least..=most).contains(&found), "{op:?} {src} {dst} {level} {precision:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn high_precision_is_high_at_every_level() {
        for level in Isa::ALL.into_iter().filter(|l| l.is_available()) {
            let context = Context::with_max_isa(level).unwrap();
            for kv in DType::ALL {
                let [fast, high] = [Precision::Default, Precision::High]
                    .map(|p| context.kernel_for(Op::Attention, kv, kv, p).unwrap());
                assert!(high.max_error <= 1e-5 && fast.max_error >= high.max_error, "{kv} {level}");
                assert!(high.precision != Some(Precision::Default) && fast.precision != Some(Precision::High));
            }
        }
    }

    #[test]
    fn values_are_packed_for_tiles_alone() {
        for level in Isa::ALL.into_iter().filter(|l| l.is_available()) {
            let context = Context::with_max_isa(level).unwrap();
            for format in CacheFormat::ALL {
                let tiles = context.isa() == Isa::Amx && format == CacheFormat::Bf16;
                let wanted = if tiles { Packing::RowPairs } else { Packing::Rows };
                assert_eq!(context.v_packing(format), wanted, "{format} {level}");
            }
        }
    }

    #[test]
    fn a_ceiling_only_lowers() {
        for ceiling in Isa::ALL.into_iter().filter(|l| l.is_built()) {
            let context = Context::with_max_isa(ceiling).unwrap();
            assert!(context.isa().is_within(ceiling));
            assert!(context.isa().is_available());
        }
        if let Some(foreign) = Isa::ALL.into_iter().find(|l| !l.is_built()) {
            assert!(Context::with_max_isa(foreign).is_err());
        }
    }
}
