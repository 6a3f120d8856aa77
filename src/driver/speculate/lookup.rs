//! Guesses from the text so far: what followed the same words before.

use super::tree::GuessTree;

/// What followed earlier occurrences of the last tokens of a text: of the last `n`, or if these did not occur before, of
/// fewer. The most recent occurrences come first; up to `branches` of them that differ become branches of up to `ahead`
/// tokens.
pub(super) fn guess(text: &[u32], n: usize, ahead: usize, branches: usize) -> GuessTree {
    let mut tree = GuessTree::new();
    if ahead == 0 {
        return tree;
    }
    for size in (1..=n.min(text.len().saturating_sub(1))).rev() {
        let last = &text[text.len() - size..];
        // An occurrence is followed by at least one token of the text.
        let occurrences = text[..text.len() - 1].windows(size).enumerate().rev();
        let mut found = 0;
        for (start, _) in occurrences.filter(|(_, window)| *window == last) {
            let from = start + size;
            let before = tree.len();
            let mut node = 0;
            for &token in text[from..].iter().take(ahead) {
                node = tree.push(node, token);
            }
            found += usize::from(tree.len() > before);
            if found == branches {
                break;
            }
        }
        if !tree.is_empty() {
            break;
        }
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paths of tokens, one per leaf.
    fn paths(tree: &GuessTree) -> Vec<Vec<u32>> {
        fn walk(tree: &GuessTree, node: usize, path: &mut Vec<u32>, all: &mut Vec<Vec<u32>>) {
            if tree.children(node).next().is_none() {
                all.push(path.clone());
            }
            for (child, token) in tree.children(node) {
                path.push(token);
                walk(tree, child, path, all);
                path.pop();
            }
        }
        let mut all = Vec::new();
        walk(tree, 0, &mut Vec::new(), &mut all);
        all
    }

    #[test]
    fn what_followed_before_is_guessed_again() {
        let text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3];
        assert_eq!(paths(&guess(&text, 2, 2, 4)), [[5, 6], [4, 9]]);
        assert_eq!(paths(&guess(&text, 2, 3, 1)), [[5, 6, 2]]);
        // No three tokens occur twice, so that two decide.
        assert_eq!(paths(&guess(&text, 3, 1, 1)), [[5]]);
        assert_eq!(guess(&text, 2, 0, 4).len() + guess(&text, 0, 2, 4).len(), 0);
        assert!(
            guess(&[1, 2, 3], 3, 4, 4).is_empty() && guess(&[1], 3, 4, 4).is_empty() && guess(&[], 3, 4, 4).is_empty()
        );
        // The text may overlap itself.
        assert_eq!(paths(&guess(&[7, 7, 7, 7], 2, 4, 4)), [vec![7, 7]]);
        assert_eq!(paths(&guess(&[7, 7], 2, 4, 4)), [[7]]);
    }

    #[test]
    fn equal_beginnings_are_shared() {
        let text = [1, 5, 6, 7, 1, 5, 6, 8, 1];
        let tree = guess(&text, 1, 3, 4);
        assert_eq!(tree.len(), 4);
        assert_eq!(paths(&tree), [[5, 6, 8], [5, 6, 7]]);
    }
}
