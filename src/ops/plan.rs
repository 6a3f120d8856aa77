//! Plans: what depends on lengths, positions and tables alone, checked and worked out once a step and used by every layer.

use crate::error::{Result, ensure};
use crate::kernels::generic::attention::{Spans, Summary};
use crate::layout::Layout;
use crate::ops::attention::{AttentionOptions, call_rows};
use crate::view::{BATCH, MAX_AXIS, RawView, SEQ};

/// The rows of an attention call: their queries, lengths, positions, windows and the layout of their cache, copied and checked.
///
/// A decoder makes one for its step and hands it to the attention of every layer, as [`AttentionOptions::plan`]; after the step,
/// [`advance`](Self::advance) takes it to the next token, which costs a look at what is new and nothing that grows with the
/// cache. Layers whose caches differ in rows or slots, or in windows, need plans of their own. A plan holds no data of a cache, no
/// mask, and nothing that depends on threads or the CPU; its size is that of its lists.
///
/// Thread safety: any number of calls may use a plan at the same time; changing it takes it alone, which `&mut` says.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// let cache = [1, 16, 2, 8];
/// let (keys, values) = (vec![0.5f32; 256], vec![0.25f32; 256]);
/// let (q, mut out) = (vec![1.0f32; 32], vec![0.0f32; 32]);
/// let options = AttentionOptions { causal: true, lengths: Some(&[3]), ..Default::default() };
/// let mut plan = AttentionPlan::new([1, 1, 4, 8], cache, &options)?;
/// for _step in 0..2 {
///     for _layer in 0..2 {
///         attention(&context, &Serial, &mut Workspace::new(), AttentionTensors {
///             q: View::new(&q, [1, 1, 4, 8])?,
///             k: View::new(&keys, cache)?,
///             v: View::new(&values, cache)?,
///             out: ViewMut::new(&mut out, [1, 1, 4, 8])?,
///             lse: None,
///         }, &AttentionOptions { plan: Some(&plan), ..Default::default() })?;
///     }
///     plan.advance(&[1])?;
/// }
/// assert_eq!(plan.lengths(), [5]);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    batch: usize,
    seq: usize,
    tokens: usize,
    /// Rows and slots of the caches; no data.
    cache: RawView,
    causal: bool,
    window_left: Option<i64>,
    window_right: Option<i64>,
    kind: Kind,
    table: Vec<i32>,
    query_starts: List,
    lengths: Vec<i32>,
    starts: List,
    offsets: List,
    prefixes: List,
    summary: Summary,
}

/// A layout without its table.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Contiguous,
    Ring { sinks: usize },
    Paged { pages_per_row: usize },
    Indirect,
    Ragged,
}

/// A list that may be absent; its memory stays when it is.
#[derive(Clone, Debug, Default)]
struct List {
    given: bool,
    entries: Vec<i32>,
}

impl List {
    fn set(&mut self, list: Option<&[i32]>) {
        self.given = list.is_some();
        self.entries.clear();
        self.entries.extend_from_slice(list.unwrap_or(&[]));
    }

    fn get(&self) -> Option<&[i32]> {
        self.given.then_some(&self.entries)
    }
}

impl AttentionPlan {
    /// A plan for queries `[batch, seq, heads, dim]` (of ragged ones `[1, tokens, heads, dim]`) and caches
    /// `[rows, slots, kv_heads, dim]`; of both, only the first two axes count. Of the options, it takes those that have an entry
    /// a row, causality, windows and the layout.
    ///
    /// # Errors
    /// What [`attention`](crate::attention()) would say of them.
    pub fn new(q_shape: [usize; 4], k_shape: [usize; 4], options: &AttentionOptions) -> Result<Self> {
        Self::from_spans(q_shape, &options.spans(q_shape, axes(k_shape))?)
    }

    /// The same plan for other rows: what [`new`](Self::new) makes, in the memory that is there already.
    ///
    /// # Errors
    /// As [`new`](Self::new); the plan is then what it was.
    pub fn update(&mut self, q_shape: [usize; 4], k_shape: [usize; 4], options: &AttentionOptions) -> Result<()> {
        self.take(q_shape, &options.spans(q_shape, axes(k_shape))?)
    }

    pub(crate) fn from_spans(q_shape: [usize; 4], spans: &Spans) -> Result<Self> {
        let mut plan = Self {
            batch: 0,
            seq: 0,
            tokens: 0,
            cache: spans.cache,
            causal: false,
            window_left: None,
            window_right: None,
            kind: Kind::Contiguous,
            table: Vec::new(),
            query_starts: List::default(),
            lengths: Vec::new(),
            starts: List::default(),
            offsets: List::default(),
            prefixes: List::default(),
            summary: Summary::default(),
        };
        plan.take(q_shape, spans)?;
        Ok(plan)
    }

    pub(crate) fn take(&mut self, q_shape: [usize; 4], spans: &Spans) -> Result<()> {
        for (name, n) in [("seq of q", q_shape[SEQ]), ("batch of k", spans.cache.shape[BATCH])] {
            ensure!(n <= MAX_AXIS, Shape, "{name} is {n}, more than {MAX_AXIS}");
        }
        call_rows(q_shape, spans)?;
        self.summary = spans.validate()?;
        (self.batch, self.seq, self.tokens) = (spans.batch, spans.seq, q_shape[SEQ]);
        self.cache = RawView { data: std::ptr::null_mut(), ..spans.cache };
        (self.causal, self.window_left, self.window_right) = (spans.causal, spans.window_left, spans.window_right);
        let (kind, table): (Kind, &[i32]) = match spans.layout {
            Layout::Contiguous => (Kind::Contiguous, &[]),
            Layout::Ring { sinks } => (Kind::Ring { sinks }, &[]),
            Layout::Paged { pages, pages_per_row } => (Kind::Paged { pages_per_row }, pages),
            Layout::Indirect { rows } => (Kind::Indirect, rows),
            Layout::Ragged { starts } => (Kind::Ragged, starts),
        };
        self.kind = kind;
        self.table.clear();
        self.table.extend_from_slice(table);
        self.lengths.clear();
        self.lengths.extend((0..spans.batch).map(|row| spans.length(row) as i32));
        self.query_starts.set(spans.query_starts);
        self.starts.set(spans.starts);
        self.offsets.set(spans.offsets);
        self.prefixes.set(spans.prefixes);
        Ok(())
    }

    /// Every row has been given so many tokens more, and as many queries follow as before: lengths, and offsets where they were
    /// given, grow. Takes no memory.
    ///
    /// # Errors
    /// A list of another length, a negative count, a row that has no room, table entries of the new tokens that are none of
    /// the cache, queries that see what a ring has overwritten. The plan is then what it was.
    pub fn advance(&mut self, counts: &[i32]) -> Result<()> {
        let n = counts.len();
        ensure!(n == self.batch, Shape, "counts has {n} entries, but the plan has {} rows", self.batch);
        let spans = self.spans();
        for (row, &count) in counts.iter().enumerate() {
            let (length, room) = (spans.length(row) as usize, spans.layout.capacity(&spans.cache, row));
            ensure!(count >= 0, OutOfRange, "counts[{row}] is {count}, which is negative");
            ensure!(
                length + count as usize <= room,
                Capacity,
                "row {row} of the plan has {length} tokens and is given {count} more, but has room for {room}"
            );
            spans.layout.validate_row("k", &spans.cache, row, length, length + count as usize)?;
        }
        self.move_by(counts, 1);
        match self.spans().summarize() {
            Ok(summary) => self.summary = summary,
            Err(error) => {
                self.move_by(counts, -1);
                return Err(error);
            }
        }
        Ok(())
    }

    fn move_by(&mut self, counts: &[i32], sign: i32) {
        for (row, &count) in counts.iter().enumerate() {
            self.lengths[row] += sign * count;
            if let Some(offset) = self.offsets.entries.get_mut(row) {
                *offset = offset.wrapping_add(sign * count);
            }
        }
    }

    /// Sets entries `first..` of a row in the table of a paged or indirect layout, before [`advance`](Self::advance) or after a
    /// page has moved.
    ///
    /// # Errors
    /// A layout without such a table, entries outside it, or ones of tokens that the row has which are none of the cache. The plan
    /// is then what it was.
    pub fn set_table(&mut self, row: usize, first: usize, entries: &[i32]) -> Result<()> {
        let (per_row, tokens) = match self.kind {
            Kind::Paged { pages_per_row } => (pages_per_row, self.cache.shape[SEQ]),
            Kind::Indirect => (self.cache.shape[SEQ], 1),
            _ => (0, 1),
        };
        ensure!(per_row > 0, InvalidValue, "the plan's layout has no table of pages or rows");
        ensure!(row < self.batch, OutOfRange, "row {row} of a plan that has {}", self.batch);
        let end = first.saturating_add(entries.len());
        ensure!(end <= per_row, OutOfRange, "entries {first}..{end} of a row that has {per_row}");
        let (used, n) = ((self.lengths[row] as usize).div_ceil(tokens), self.cache.shape[BATCH]);
        for (i, &entry) in entries.iter().enumerate() {
            ensure!(
                first + i >= used || entry >= 0 && (entry as usize) < n,
                OutOfRange,
                "entry {} of row {row} is {entry}, but k has batch = {n}",
                first + i
            );
        }
        self.table[row * per_row + first..row * per_row + end].copy_from_slice(entries);
        Ok(())
    }

    /// `[batch]`: the tokens of every row.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// What it holds, as a call takes it.
    pub(crate) fn spans(&self) -> Spans<'_> {
        let table = &self.table[..];
        Spans {
            batch: self.batch,
            seq: self.seq,
            cache: self.cache,
            layout: match self.kind {
                Kind::Contiguous => Layout::Contiguous,
                Kind::Ring { sinks } => Layout::Ring { sinks },
                Kind::Paged { pages_per_row } => Layout::Paged { pages: table, pages_per_row },
                Kind::Indirect => Layout::Indirect { rows: table },
                Kind::Ragged => Layout::Ragged { starts: table },
            },
            query_starts: self.query_starts.get(),
            causal: self.causal,
            window_left: self.window_left,
            window_right: self.window_right,
            lengths: Some(&self.lengths),
            starts: self.starts.get(),
            offsets: self.offsets.get(),
            prefixes: self.prefixes.get(),
        }
    }

    pub(crate) fn summary(&self) -> Summary {
        self.summary
    }

    /// Checks that a call's tensors are those that it was made for.
    pub(crate) fn check(&self, q: &RawView, k_shape: [usize; 4]) -> Result<()> {
        let rows = if self.query_starts.given { 1 } else { self.batch };
        let (want, have) = ([rows, self.tokens], [q.shape[BATCH], q.shape[SEQ]]);
        ensure!(want == have, Shape, "the plan is for q of batch and seq {want:?}, but q has {have:?}");
        let axes = |shape: [usize; 4]| [shape[BATCH], shape[SEQ]];
        let (want, have) = (axes(self.cache.shape), axes(k_shape));
        ensure!(want == have, Shape, "the plan is for k of batch and seq {want:?}, but k has {have:?}");
        Ok(())
    }
}

// SAFETY: the view has no data, and is numbers but for that.
unsafe impl Sync for AttentionPlan {}
// SAFETY: as above.
unsafe impl Send for AttentionPlan {}

/// A cache of which only rows and slots count.
fn axes(k_shape: [usize; 4]) -> RawView {
    let shape = [k_shape[BATCH], k_shape[SEQ], 1, 1];
    let dtype = crate::dtype::DType::F32;
    RawView { data: std::ptr::null_mut(), dtype, shape, strides: [0; 4], bytes: None }
}
