//! How far two distributions are from each other.

/// How far two distributions of counts are from each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Jensen–Shannon, 0 to 1.
    pub bits: f64,
    /// How much of it so few counts may show where there is none.
    pub by_chance: f64,
}

impl Divergence {
    /// Compares counts of the same things in the same order; `None` when one side counted nothing.
    pub fn between(first: &[u64], second: &[u64]) -> Option<Self> {
        let (all_first, all_second) = (first.iter().sum::<u64>(), second.iter().sum::<u64>());
        if all_first == 0 || all_second == 0 || first.len() != second.len() {
            return None;
        }
        let share =
            |(&first, &second): (&u64, &u64)| (first as f64 / all_first as f64, second as f64 / all_second as f64);
        let term = |share: f64, middle: f64| if share > 0.0 { share * (share / middle).log2() } else { 0.0 };
        let shares = first.iter().zip(second).map(share);
        let bits: f64 = shares.map(|(a, b)| 0.5 * (term(a, 0.5 * (a + b)) + term(b, 0.5 * (a + b)))).sum();
        let seen = first.iter().zip(second).filter(|(first, second)| **first + **second > 0).count();
        // Of equal distributions, 8 ln 2 · bits / (1/n + 1/m) is nearly chi-squared with so many degrees of freedom;
        // that is above its mean and four standard deviations about once in a hundred.
        let freedom = seen.saturating_sub(1) as f64;
        let unit = (1.0 / all_first as f64 + 1.0 / all_second as f64) / (8.0 * std::f64::consts::LN_2);
        Some(Self { bits: bits.clamp(0.0, 1.0), by_chance: unit * (freedom + 4.0 * (2.0 * freedom).sqrt()) })
    }

    /// How far they are at least from each other.
    pub fn certain(&self) -> f64 {
        (self.bits - self.by_chance).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn equal_ones_are_not_apart_and_others_are() {
        let bits = |first: &[u64], second: &[u64]| Divergence::between(first, second).unwrap().bits;
        assert_eq!(bits(&[10, 20], &[100, 200]), 0.0);
        assert_eq!(bits(&[10, 0], &[0, 10]), 1.0);
        // By hand: halves against three quarters and one.
        assert!((bits(&[2, 2], &[3, 1]) - 0.048_8).abs() < 1e-3);
        assert_eq!(Divergence::between(&[1], &[0]), None);
        assert_eq!(Divergence::between(&[1], &[1, 1]), None);
    }

    #[test]
    fn chance_is_told_from_difference() {
        let mut random = StdRng::seed_from_u64(3);
        let mut mistaken = 0;
        for _ in 0..1_000 {
            let mut draw = |count: u64| {
                let mut counts = [0; 10];
                (0..count).for_each(|_| counts[random.random_range(0..10)] += 1);
                counts
            };
            let found = Divergence::between(&draw(400), &draw(40)).unwrap();
            mistaken += u32::from(found.certain() > 0.0);
        }
        assert!(mistaken <= 20, "{mistaken} of 1000");
        let shifted = Divergence::between(&[300, 300, 300], &[10, 10, 80]).unwrap();
        assert!(shifted.certain() > 0.05, "{shifted:?}");
    }
}
