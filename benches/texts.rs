//! Texts of many lengths, made of words by a seed: the same ones for the server and for all that it is held against.

use anyhow::{Context, Result, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Tokens of the shortest text and of the longest, special ones included.
pub const SHORTEST: usize = 8;
pub const LONGEST: usize = 256;
/// So many texts in a row have all lengths: wherever a window begins and ends, about the same was asked in it.
pub const ROUND: usize = 64;

const SEED: u64 = 7;

/// Words that vocabularies of English know as one token, most of them, and some that they put together.
const WORDS: &str = "the a of and to in is that for it with as was on by at from be this have or not are but had his they \
    she which you one were all their there been if more when will would who so no time people year way day man thing \
    woman life child world school state family student group country problem hand part place case week company system \
    program question work government number night point home water room mother area money story fact month lot right \
    study book eye job word business issue side kind head house service friend father power hour game line end member \
    law car city community name president team minute idea kid body information back parent face others level office \
    door health person art war history party result change morning reason research girl guy moment air teacher force \
    education harbour lantern orchard estuary meadow granite thistle whistling overgrown ferryman lighthouses \
    shipwrights weathervane tidewater saltmarshes driftwood fogbound moorings unhurriedly cobblestoned";

/// A text, and how many tokens it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    pub text: String,
    pub tokens: usize,
}

/// `rounds` times as many texts as a round has, of lengths whose logarithms are spread evenly, so that short ones are as
/// common as they are where people write them. `tokens` counts those of a text.
///
/// # Errors
/// What `tokens` fails with; when it counts more or fewer in a text than in its words.
pub fn made_up(rounds: usize, mut tokens: impl FnMut(&str) -> Result<usize>) -> Result<Vec<Text>> {
    let special = tokens("")?;
    let mut words = Vec::new();
    for word in WORDS.split_whitespace() {
        words.push((word, tokens(word)?.saturating_sub(special)));
    }
    let single: Vec<&str> = words.iter().filter(|(_, tokens)| *tokens == 1).map(|(word, _)| *word).collect();
    ensure!(!single.is_empty(), "no word is one token");
    let mut random = StdRng::seed_from_u64(SEED);
    let mut texts = Vec::with_capacity(rounds * ROUND);
    for _ in 0..rounds {
        let mut lengths: Vec<usize> = (0..ROUND).map(length).collect();
        lengths.shuffle(&mut random);
        for length in lengths {
            let (mut chosen, mut left) = (Vec::new(), length.checked_sub(special).context("no room for a word")?);
            while left > 0 {
                let (word, count) = words[random.random_range(0..words.len())];
                // What has no room gives way to a word that has.
                let one = (single[random.random_range(0..single.len())], 1);
                let (word, count) = if count <= left { (word, count) } else { one };
                chosen.push(word);
                left -= count;
            }
            let text = chosen.join(" ");
            let found = tokens(&text)?;
            ensure!(found == length, "a text of {length} tokens by its words has {found}: '{text}'");
            texts.push(Text { text, tokens: length });
        }
    }
    Ok(texts)
}

/// Tokens of the text at `place` of a round, by rising length: the middle of its share of the logarithms.
fn length(place: usize) -> usize {
    let (shortest, longest) = (SHORTEST as f64, LONGEST as f64);
    let share = (place as f64 + 0.5) / ROUND as f64;
    (shortest * (longest / shortest).powf(share)).round() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two special tokens, and one for every five letters.
    fn count(text: &str) -> usize {
        2 + text.split_whitespace().map(|word| word.len().div_ceil(5)).sum::<usize>()
    }

    #[test]
    fn every_round_has_all_lengths_and_no_text_comes_twice() {
        let texts = made_up(3, |text| Ok(count(text))).unwrap();
        assert_eq!(texts.len(), 3 * ROUND);
        assert!(texts.iter().all(|text| text.tokens == count(&text.text)));
        let sorted = |round: &[Text]| {
            let mut lengths: Vec<usize> = round.iter().map(|text| text.tokens).collect();
            lengths.sort_unstable();
            lengths
        };
        let rounds: Vec<_> = texts.chunks(ROUND).map(sorted).collect();
        assert!(rounds.iter().all(|round| *round == rounds[0]));
        assert!(rounds[0][0] == 8 && (245..=256).contains(&rounds[0][ROUND - 1]), "{:?}", rounds[0]);
        // As many below the geometric middle as above it.
        assert_eq!(rounds[0].iter().filter(|&&length| length < 45).count(), ROUND / 2);
        let lengths = |round: usize| texts[round * ROUND..].iter().take(ROUND).map(|text| text.tokens);
        assert!(!lengths(0).eq(lengths(1)), "every round has another order");
        for (place, text) in texts.iter().enumerate() {
            assert!(texts[..place].iter().all(|other| other.text != text.text), "'{}' comes twice", text.text);
        }
        assert_eq!(made_up(3, |text| Ok(count(text))).unwrap(), texts);
    }

    #[test]
    fn tokens_that_do_not_add_up_are_noticed() {
        assert!(made_up(1, |text| Ok(if text.contains(' ') { 1 } else { count(text) })).is_err());
        assert!(made_up(1, |_| anyhow::bail!("no tokenizer")).is_err());
    }
}
