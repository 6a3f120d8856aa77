//! A tree of guesses: which token follows which, and the bits that make a pass see it so.

use crate::driver::decoder::TreePass;

/// Probabilities of tokens, each token once. Tokens that are not listed have none.
pub type Distribution = Vec<(u32, f64)>;

/// Guessed tokens after the last token of a text, which is the root.
///
/// Nodes are numbered in the order in which they were added, the root is 0. A parent comes before its children, and the
/// children of a node are different tokens.
///
/// ```
/// use kvlane::driver::GuessTree;
/// let mut tree = GuessTree::new();
/// let the = tree.push(0, 11);
/// tree.push(the, 7);
/// tree.push(0, 12);
/// assert_eq!(tree.len(), 3);
/// assert_eq!(tree.depth(2), 2);
/// assert_eq!(tree.child(0, 12), Some(3));
/// ```
#[derive(Debug, Clone, Default)]
pub struct GuessTree {
    /// Of node i + 1.
    guesses: Vec<Guess>,
    /// Of every node that has one: the distribution from which its children were drawn.
    sources: Vec<(usize, Distribution)>,
}

#[derive(Debug, Clone, Copy)]
struct Guess {
    token: u32,
    parent: usize,
    depth: usize,
}

impl GuessTree {
    /// The root alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of guesses.
    pub fn len(&self) -> usize {
        self.guesses.len()
    }

    /// Whether there is no guess.
    pub fn is_empty(&self) -> bool {
        self.guesses.is_empty()
    }

    /// Adds a guess after node `parent`, and returns its number; that of the child with this token, if there is one.
    ///
    /// # Panics
    /// If there is no such parent.
    pub fn push(&mut self, parent: usize, token: u32) -> usize {
        if let Some(child) = self.child(parent, token) {
            return child;
        }
        let depth = self.depth(parent) + 1;
        self.guesses.push(Guess { token, parent, depth });
        self.guesses.len()
    }

    /// Says that the children of a node are drawn at random, one after the other, from this distribution, without
    /// putting back those drawn before. Children of other nodes were chosen otherwise.
    ///
    /// How many are drawn must not depend on which are drawn.
    pub fn set_source(&mut self, node: usize, distribution: Distribution) {
        self.sources.push((node, distribution));
    }

    /// The distribution from which the children of a node were drawn.
    pub fn source(&self, node: usize) -> Option<&Distribution> {
        self.sources.iter().find(|(n, _)| *n == node).map(|(_, distribution)| distribution)
    }

    /// The token of a guess; the root has none.
    pub fn token(&self, node: usize) -> Option<u32> {
        Some(self.guesses.get(node.checked_sub(1)?)?.token)
    }

    /// The number of tokens from the root to a node.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn depth(&self, node: usize) -> usize {
        node.checked_sub(1).map_or(0, |i| self.guesses[i].depth)
    }

    /// The children of a node and their tokens, in the order in which they were added.
    pub fn children(&self, node: usize) -> impl Iterator<Item = (usize, u32)> {
        let children = self.guesses.iter().zip(1..).filter(move |(guess, _)| guess.parent == node);
        children.map(|(guess, i)| (i, guess.token))
    }

    /// The child of a node with this token.
    pub fn child(&self, node: usize, token: u32) -> Option<usize> {
        self.children(node).find(|&(_, t)| t == token).map(|(child, _)| child)
    }

    /// Drops the guesses that were added last, down to `len`.
    pub fn truncate(&mut self, len: usize) {
        self.guesses.truncate(len);
        self.sources.retain(|&(node, _)| node <= len);
    }

    /// For the last `new` nodes of `order`: their positions, if the root stands at `root`, and a line of bits of the nodes
    /// of `order` that each sees, itself and its ancestors. `order` is the order of the nodes in the cache. Nodes that are
    /// not in it must be visible to all.
    pub(super) fn bits(&self, order: &[usize], new: usize, root: usize) -> TreeBits {
        let line = order.len().div_ceil(8);
        let mut bits = TreeBits { positions: Vec::with_capacity(new), visible: vec![0; new * line] };
        for (i, &node) in order[order.len() - new..].iter().enumerate() {
            bits.positions.push((root + self.depth(node)) as i32);
            let mut at = Some(node);
            while let Some(node) = at {
                if let Some(slot) = order.iter().position(|&n| n == node) {
                    bits.visible[i * line + slot / 8] |= 1 << (slot % 8);
                }
                at = node.checked_sub(1).map(|i| self.guesses[i].parent);
            }
        }
        bits
    }
}

/// What a [`TreePass`] borrows.
pub(super) struct TreeBits {
    positions: Vec<i32>,
    visible: Vec<u8>,
}

impl TreeBits {
    /// `first_key` is the slot of the first node in the order.
    pub fn pass(&self, first_key: usize) -> TreePass<'_> {
        TreePass { positions: &self.positions, first_key, visible: &self.visible }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_see_themselves_and_their_ancestors() {
        let mut tree = GuessTree::new();
        let (a, b) = (tree.push(0, 5), tree.push(0, 6));
        let (c, d) = (tree.push(b, 5), tree.push(a, 9));
        assert_eq!((a, b, c, d), (1, 2, 3, 4));
        assert_eq!(tree.push(b, 5), c);
        let bits = tree.bits(&[0, 1, 2, 3, 4], 5, 20);
        assert_eq!(bits.positions, [20, 21, 21, 22, 22]);
        assert_eq!(bits.visible, [0b00001, 0b00011, 0b00101, 0b01101, 0b10011]);
        // Behind the root, in another order, the last two alone.
        let bits = tree.bits(&[2, 1, 4, 3], 2, 20);
        assert_eq!((bits.positions, bits.visible), (vec![22, 22], vec![0b0110, 0b1001]));
        tree.truncate(2);
        assert_eq!((tree.len(), tree.children(b).count()), (2, 0));
    }
}
