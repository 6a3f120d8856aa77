//! The weights of a layer's feed-forward part, which may have several experts.

use std::ops::Range;

use super::config::ExpertConfig;
use super::weights::{Reader, rows_of};
use crate::driver::error::Result;
use crate::driver::linear::Matrix;
use crate::driver::quant::Tensor;

/// A gated feed-forward network: `(act(x G^T) * (x U^T)) D^T`.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    /// The gate and up projections in one matrix, in this order: `[2 * ffn_dim, dim]`.
    pub gate_up: Matrix,
    /// Back to the residual stream, `[dim, ffn_dim]`.
    pub down: Matrix,
}

/// A mixture of experts: the router chooses a few of them for every token.
#[derive(Debug, Clone)]
pub struct Experts {
    /// How many there are, and how they are chosen.
    pub config: ExpertConfig,
    /// One row per expert, `[experts, dim]`.
    pub router: Matrix,
    /// The experts.
    pub experts: Vec<GatedMlp>,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone)]
pub enum FeedForward {
    /// One network for all tokens.
    Dense(GatedMlp),
    /// Several, of which each token passes a few.
    Experts(Experts),
}

impl FeedForward {
    /// All matrices.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let (router, networks) = match self {
            Self::Dense(network) => (None, std::slice::from_ref(network)),
            Self::Experts(e) => (Some(&e.router), e.experts.as_slice()),
        };
        router.into_iter().chain(networks.iter().flat_map(|n| [&n.gate_up, &n.down]))
    }
}

impl Reader<'_> {
    /// The feed-forward part of the layer whose tensors have the names `name(part)`.
    pub(super) fn feed_forward(&mut self, name: impl Fn(&str) -> String) -> Result<FeedForward> {
        let (c, n) = (self.file.config(), self.names);
        let (dim, ffn) = (c.dim, c.ffn_dim);
        let Some(config) = c.experts else {
            let [gate, up] = n.gate_up.map(&name);
            return Ok(FeedForward::Dense(self.network([gate, up, name(n.down)])?));
        };
        let router = self.matrix(&[(name(n.router), config.count, 0..config.count)], dim)?;
        let mut experts = Vec::new();
        let stacked = n.stacked_experts.map(|names| names.map(&name));
        let stacked = match stacked {
            Some(names) if self.file.tensor(&names[0])?.is_some() => Some(names),
            _ => None,
        };
        let Some([gate, up, down]) = stacked else {
            for i in 0..config.count {
                experts.push(self.network(n.experts.map(|part| name(&part.replace("{}", &i.to_string()))))?);
            }
            return Ok(FeedForward::Experts(Experts { config, router, experts }));
        };
        let gate = self.tensor(gate, &[config.count, ffn, dim])?;
        let up = self.tensor(up, &[config.count, ffn, dim])?;
        let down = self.tensor(down, &[config.count, dim, ffn])?;
        // The first walk reads nothing.
        if let (Some(gate), Some(up), Some(down)) = (gate, up, down) {
            let (ffn_rows, dim_rows) = (self.rows.ffn.clone(), self.rows.dim.clone());
            // The `i`-th matrix of a stack. Blocks of elements never reach over the end of a row, and so not over a matrix's.
            let slice = |stack: &Tensor<'_>, i: usize, wanted: &Range<usize>| {
                let bytes = stack.data.len() / config.count;
                rows_of(stack, &stack.data[i * bytes..][..bytes], stack.shape[1], wanted.clone())
            };
            for i in 0..config.count {
                let gate_up = Matrix::stack(vec![slice(&gate, i, &ffn_rows)?, slice(&up, i, &ffn_rows)?])?;
                experts.push(GatedMlp { gate_up, down: slice(&down, i, &dim_rows)? });
            }
        }
        Ok(FeedForward::Experts(Experts { config, router, experts }))
    }

    fn network(&mut self, [gate, up, down]: [String; 3]) -> Result<GatedMlp> {
        let (dim, ffn) = (self.file.config().dim, self.file.config().ffn_dim);
        let (ffn_rows, dim_rows) = (self.rows.ffn.clone(), self.rows.dim.clone());
        let gate_up = self.matrix(&[(gate, ffn, ffn_rows.clone()), (up, ffn, ffn_rows)], dim)?;
        Ok(GatedMlp { gate_up, down: self.matrix(&[(down, dim, dim_rows)], ffn)? })
    }
}
