//! How far keys, values and attention over a cache in some format are from those over a cache in f32, on what a model makes of a text.

use super::cache::{Cache, Formats};
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::perplexity::windows;
use crate::{
    AttentionOptions, AttentionTensors, CacheFormat, Destination, KvRead, KvWrite, Source, View, ViewMut, Workspace,
    attention, kv_read, kv_write,
};

/// How far vectors of heads are from those that they stand for.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Deviation {
    /// The cosine of the angle between the two vectors of a head, at most 1: the mean over tokens and heads.
    pub mean_cosine: f64,
    /// The least cosine.
    pub least_cosine: f64,
    /// The largest difference of an element, in units of the root mean square of all elements of its layer.
    pub largest_error: f64,
}

/// What a cache does to a layer, or to all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct CacheError {
    /// The keys as they are read back, after RoPE.
    pub k: Deviation,
    /// The values as they are read back.
    pub v: Deviation,
    /// The outputs of attention, with the model's own queries, scale and window.
    pub attention: Deviation,
}

impl Deviation {
    fn of_all(layers: impl Iterator<Item = Self> + Clone) -> Self {
        let n = layers.clone().count() as f64;
        let worst = |of: fn(&Self) -> f64| layers.clone().map(|d| of(&d)).fold(f64::NEG_INFINITY, larger);
        Self {
            mean_cosine: layers.clone().map(|d| d.mean_cosine).sum::<f64>() / n,
            least_cosine: -worst(|d| -d.least_cosine),
            largest_error: worst(|d| d.largest_error),
        }
    }
}

impl CacheError {
    /// That of all layers, from that of each: means of means, the least cosine, the largest error.
    pub fn of_all(layers: &[Self]) -> Self {
        let of = |part: fn(&Self) -> Deviation| Deviation::of_all(layers.iter().map(part));
        Self { k: of(|e| e.k), v: of(|e| e.v), attention: of(|e| e.attention) }
    }
}

/// Runs `decoder` over the tokens `ids` with a cache in f32, writes the keys and values of every layer to a cache of each of `formats`,
/// reads them back, and lets the queries of the run attend to both caches. Returns a list of layers for each of `formats`.
///
/// The text is cut into windows of `context` tokens, as by [`perplexity`](super::perplexity()). Every format is given the same keys and
/// values, so that errors of one layer do not move the next. `progress` is told the tokens that are done.
///
/// # Errors
/// The text has no tokens; `context` is too small or does not fit into memory; the heads of the model are no multiple of a format's
/// units, or cannot be rotated.
pub fn cache_error(
    decoder: &Decoder,
    ids: &[u32],
    (context, first): (usize, Option<u32>),
    formats: &[Formats],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<CacheError>>> {
    if ids.is_empty() {
        return Err(Error::argument("the text has 0 tokens; at least 1 is needed"));
    }
    let (c, layers) = (decoder.config(), decoder.config().layers.len());
    let mut one = c.clone();
    one.layers.truncate(1);
    let room = context.min(ids.len());
    let mut cache = Cache::without_rings(c, 1, room, CacheFormat::F32)?;
    // A layer at a time is in each of the formats.
    let make = |&formats: &Formats| Cache::without_rings(&one, 1, room, formats);
    let mut others = formats.iter().map(make).collect::<Result<Vec<_>>>()?;
    let mut sums = vec![vec![[Sums::default(); 3]; layers]; formats.len()];
    let (mut scratch, mut workspace, mut done) = (Scratch::keeping_queries(layers), Workspace::new(), 0);
    for (tokens, len) in windows(ids, (context, first))? {
        cache.reset(0);
        decoder.forward(&mut cache, &mut scratch, 0, &[&tokens], Logits::None)?;
        for (layer, queries) in scratch.take_queries().iter().enumerate() {
            let mut run = Layer { decoder, layer, tokens: tokens.len(), workspace: &mut workspace };
            let [k, v] = run.read((&cache, layer))?;
            let exact = [&k, &v, &run.attend((&cache, layer), queries)?];
            for (other, sums) in others.iter_mut().zip(&mut sums) {
                run.write(other, [&k, &v])?;
                let [k, v] = run.read((other, 0))?;
                let found = [&k, &v, &run.attend((other, 0), queries)?];
                for (sum, (found, exact)) in sums[layer].iter_mut().zip(found.into_iter().zip(exact)) {
                    sum.add(found, exact, c.head_dim);
                }
            }
            progress(done + len * (layer + 1) / layers);
        }
        done += len;
    }
    let finish =
        |[k, v, attention]: &[Sums; 3]| CacheError { k: k.finish(), v: v.finish(), attention: attention.finish() };
    Ok(sums.iter().map(|layers| layers.iter().map(finish).collect()).collect())
}

/// The tokens of a window in one layer.
struct Layer<'a> {
    decoder: &'a Decoder,
    layer: usize,
    tokens: usize,
    workspace: &'a mut Workspace,
}

impl Layer<'_> {
    fn kv_shape(&self) -> [usize; 4] {
        let c = self.decoder.config();
        [1, self.tokens, c.kv_heads, c.head_dim]
    }

    /// Keys and values, `[tokens, kv_heads, head_dim]`, not rotated by a Hadamard matrix.
    fn read(&self, (cache, layer): (&Cache, usize)) -> Result<[Vec<f32>; 2]> {
        let shape = self.kv_shape();
        let [mut k, mut v] = [(); 2].map(|()| vec![0.0; shape.iter().product()]);
        let (k_cache, v_cache) = cache.views(layer)?;
        let targets = (ViewMut::new(&mut k, shape)?, ViewMut::new(&mut v, shape)?);
        let mut read = KvRead::new(k_cache, v_cache, targets.0, targets.1, Source::positions(&[0]));
        [read.k_hadamard, read.v_hadamard] = cache.hadamard();
        kv_read(self.decoder.context(), self.decoder.threads(), read)?;
        Ok([k, v])
    }

    fn write(&self, cache: &mut Cache, [k, v]: [&[f32]; 2]) -> Result<()> {
        let (shape, hadamard) = (self.kv_shape(), cache.hadamard());
        let (k_cache, v_cache) = cache.views_mut(0)?;
        let sources = (View::new(k, shape)?, View::new(v, shape)?);
        let mut write = KvWrite::new(sources.0, sources.1, k_cache, v_cache, Destination::positions(&[0]));
        [write.k_hadamard, write.v_hadamard] = hadamard;
        Ok(kv_write(self.decoder.context(), self.decoder.threads(), write)?)
    }

    /// The outputs for queries `[tokens, heads, head_dim]`, as [`Decoder::forward`] computes them.
    fn attend(&mut self, (cache, layer): (&Cache, usize), queries: &[f32]) -> Result<Vec<f32>> {
        let c = self.decoder.config();
        let (lengths, shape) = ([self.tokens as i32], [1, self.tokens, c.heads, c.head_dim]);
        let mut options = AttentionOptions::new().causal(true).lengths(&lengths);
        options.window_left = c.layers[self.layer].window.map(|n| n as u32 - 1);
        (options.scale, options.softcap) = (c.attn_scale, c.attn_softcap);
        [options.k_hadamard, options.v_hadamard] = cache.hadamard();
        let mut out = vec![0.0; queries.len()];
        let (k, v) = cache.views(layer)?;
        let tensors = AttentionTensors::new(View::new(queries, shape)?, k, v, ViewMut::new(&mut out, shape)?);
        attention(self.decoder.context(), self.decoder.threads(), self.workspace, tensors, &options)?;
        Ok(out)
    }
}

/// The larger of two numbers, or NaN if one is.
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

#[derive(Clone, Copy, Default)]
struct Sums {
    vectors: usize,
    elements: usize,
    cosine: f64,
    /// 1 minus the least cosine.
    largest_angle: f64,
    difference: f64,
    squares: f64,
}

impl Sums {
    fn add(&mut self, found: &[f32], exact: &[f32], dim: usize) {
        for (found, exact) in found.chunks_exact(dim).zip(exact.chunks_exact(dim)) {
            let (mut dot, mut own, mut its) = (0.0, 0.0, 0.0);
            for (&found, &exact) in found.iter().zip(exact) {
                let (found, exact) = (f64::from(found), f64::from(exact));
                dot += found * exact;
                own += found * found;
                its += exact * exact;
                self.difference = larger(self.difference, (found - exact).abs());
            }
            let cosine = match (own == 0.0, its == 0.0) {
                (true, true) => 1.0,
                (false, false) => dot / (own.sqrt() * its.sqrt()),
                _ => 0.0,
            };
            // Rounding can make it a little more than 1.
            let cosine = if cosine > 1.0 { 1.0 } else { cosine };
            self.cosine += cosine;
            self.largest_angle = larger(self.largest_angle, 1.0 - cosine);
            self.squares += its;
            self.vectors += 1;
        }
        self.elements += exact.len();
    }

    fn finish(&self) -> Deviation {
        let rms = (self.squares / self.elements as f64).sqrt();
        Deviation {
            mean_cosine: self.cosine / self.vectors as f64,
            least_cosine: 1.0 - self.largest_angle,
            largest_error: if self.difference == 0.0 { 0.0 } else { self.difference / rms },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::embedded;
    use crate::driver::threads::Threads;

    /// Attention that is measured is the model's, with a window, too.
    #[test]
    fn attention_is_that_of_the_run() {
        let file = embedded::open().unwrap();
        for window in [None, Some(5)] {
            let (mut config, weights) = (file.config().clone(), file.weights(&|_, _| ()).unwrap());
            let (layers, ids) = (config.layers.len(), Vec::from_iter(10..60));
            config.layers.iter_mut().for_each(|layer| layer.window = window);
            let decoder = Decoder::new(config, weights, 0, None, Threads::new(1).unwrap()).unwrap();
            let mut cache = Cache::without_rings(decoder.config(), 1, ids.len(), CacheFormat::F32).unwrap();
            let mut scratch = Scratch::keeping_queries(layers);
            decoder.forward(&mut cache, &mut scratch, 0, &[&ids], Logits::None).unwrap();
            let (layer, queries) = (layers - 1, scratch.take_queries());
            let mut run = Layer { decoder: &decoder, layer, tokens: ids.len(), workspace: &mut Workspace::new() };
            let found = run.attend((&cache, layer), &queries[layer]).unwrap();
            assert!(found == scratch.last_attention(), "{window:?}");
            // Taken, they begin anew.
            decoder.forward(&mut cache, &mut scratch, 0, &[&[]], Logits::None).unwrap();
            assert!(scratch.take_queries().iter().all(Vec::is_empty));
        }
    }

    #[test]
    fn deviations_are_those_of_their_definitions() {
        let mut sums = Sums::default();
        // Cosines 1, 24/25 and 0; the root mean square of 3, 4, 3, 4, 0, 0 is 5 / sqrt(3).
        sums.add(&[6.0, 8.0, 4.0, 3.0, 1.0, 0.0], &[3.0, 4.0, 3.0, 4.0, 0.0, 0.0], 2);
        let found = sums.finish();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a}, not {b}");
        close(found.mean_cosine, 1.96 / 3.0);
        close(found.least_cosine, 0.0);
        close(found.largest_error, 4.0 * 3f64.sqrt() / 5.0);
        let mut same = Sums::default();
        same.add(&[0.0; 4], &[0.0; 4], 2);
        let same = same.finish();
        assert_eq!((same.mean_cosine, same.least_cosine, same.largest_error), (1.0, 1.0, 0.0));
        let all = Deviation::of_all([found, same].into_iter());
        close(all.mean_cosine, (1.0 + 1.96 / 3.0) / 2.0);
        assert_eq!((all.least_cosine, all.largest_error), (found.least_cosine, found.largest_error));
        // What is no number is no small error.
        sums.add(&[f32::NAN, 1.0], &[1.0, 1.0], 2);
        sums.add(&[1.0, 1.0], &[1.0, 1.0], 2);
        let broken = Deviation::of_all([same, sums.finish(), same].into_iter());
        assert!(broken.mean_cosine.is_nan() && broken.least_cosine.is_nan() && broken.largest_error.is_nan());
    }
}
