//! Stop strings in a text that arrives in pieces.

/// Holds back text that may be the beginning of a stop string.
#[derive(Debug, Default)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// None of the strings is empty.
    pub(super) fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Takes a piece of text. Returns the text that is final, and whether a stop string has ended it.
    pub(super) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held += piece;
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let starts_a_stop = |&at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let at = self.held.char_indices().map(|(at, _)| at).find(starts_a_stop).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text that was held back.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text before the stop string, whatever the cut into pieces.
    fn run(text: &str, stops: &[&str], size: usize) -> (String, bool) {
        let mut strings = StopStrings::new(&stops.iter().map(|&s| s.to_owned()).collect::<Vec<_>>());
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(size) {
            let (text, ended) = strings.push(&piece.iter().collect::<String>());
            out += &text;
            if ended {
                return (out, true);
            }
        }
        (out + &strings.finish(), false)
    }

    #[test]
    fn stops_are_found_across_pieces() {
        for size in 1..8 {
            assert_eq!(run("one END two", &["END"], size), ("one ".into(), true));
            assert_eq!(run("aab aaab aaaab", &["aaaab"], size), ("aab aaab ".into(), true));
            assert_eq!(run("no stop here EN", &["END"], size), ("no stop here EN".into(), false));
            assert_eq!(run("über\n\nnächste", &["\n\n", "nä"], size), ("über".into(), true));
            assert_eq!(run("plain", &[], size), ("plain".into(), false));
        }
        // The earlier of two in one piece.
        assert_eq!(run("a END b STOP", &["STOP", "END"], 100), ("a ".into(), true));
    }

    #[test]
    fn text_is_held_no_longer_than_needed() {
        let mut strings = StopStrings::new(&["\n\n".to_owned()]);
        assert_eq!(strings.push("word"), ("word".into(), false));
        assert_eq!(strings.push("\n"), (String::new(), false));
        assert_eq!(strings.push("next"), ("\nnext".into(), false));
    }
}
