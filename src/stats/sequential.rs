//! Tests that may be looked at as often as one likes: the mixture sequential probability ratio test of two shares.
//!
//! A test for a fixed number of requests, looked at every so many, cries wolf: at 2 % errors in both of two versions, one
//! look every 200 requests and 20,000 of them, 34 % of rollouts would be given up for nothing; with this test below 1 %
//! (simulated below). After Johari, Pekelis and Walsh, "Always valid inference".

/// What is asked of a test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Test {
    /// The share of comparisons that may find a difference where there is none, however often one looks.
    pub alpha: f64,
    /// The size of difference that it is best at; much larger ones take longer than they might.
    pub size: f64,
}

/// So many of a number of answers had what is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub hits: u64,
    pub of: u64,
}

/// What is known of the difference of two shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// The second share less the first.
    pub estimate: f64,
    /// No further from the estimate than this lies the true difference, at every look, but in a share `alpha` of cases.
    pub radius: f64,
    /// The natural logarithm of how much likelier some difference is than none.
    pub evidence: f64,
}

impl Share {
    /// From 0 to 1; `None` of no answers.
    pub fn value(self) -> Option<f64> {
        (self.of > 0).then(|| self.hits as f64 / self.of as f64)
    }
}

impl Difference {
    /// Compares what two versions did; `None` as long as one of them did nothing.
    pub fn between(first: Share, second: Share, test: Test) -> Option<Self> {
        let estimate = second.value()? - first.value()?;
        // One more hit and one more miss for each: a share of which nothing was seen yet is not known to be none.
        let pooled = (first.hits + second.hits + 2) as f64 / (first.of + second.of + 4) as f64;
        let variance = pooled * (1.0 - pooled) * (1.0 / first.of as f64 + 1.0 / second.of as f64);
        Some(Self::of(estimate, variance, test))
    }

    /// Compares what was seen with what may be at most.
    pub fn above(limit: f64, seen: Share, test: Test) -> Option<Self> {
        let estimate = seen.value()? - limit;
        let smooth = (seen.hits + 1) as f64 / (seen.of + 2) as f64;
        Some(Self::of(estimate, smooth * (1.0 - smooth) / seen.of as f64, test))
    }

    fn of(estimate: f64, variance: f64, Test { alpha, size }: Test) -> Self {
        let (squared, both) = (size * size, variance + size * size);
        let spread = 0.5 * (variance / both).ln();
        let evidence = spread + squared * estimate * estimate / (2.0 * variance * both);
        let radius = (2.0 * variance * both / squared * (-alpha.ln() - spread)).sqrt();
        Self { estimate, radius, evidence }
    }

    /// Whether the second share is larger for certain.
    pub fn is_larger(&self, alpha: f64) -> bool {
        self.estimate > 0.0 && self.evidence >= -alpha.ln()
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    const ALPHA: f64 = 0.05;
    const TEST: Test = Test { alpha: ALPHA, size: 0.01 };
    const REPEATS: u64 = 300;

    /// The request at which the canary is given up, looked at every so many of `most`.
    fn given_up(seed: u64, shares: [f64; 2], canary: f64, every: u64, most: u64, alpha: f64) -> Option<u64> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut seen = [Share::default(); 2];
        for request in 1..=most {
            let arm = usize::from(random.random_bool(canary));
            seen[arm].of += 1;
            seen[arm].hits += u64::from(random.random_bool(shares[arm]));
            if request % every == 0 {
                let difference = Difference::between(seen[0], seen[1], Test { alpha, ..TEST });
                if difference.is_some_and(|difference| difference.is_larger(alpha)) {
                    return Some(request);
                }
            }
        }
        None
    }

    /// The median over many rollouts; those that are not given up count as longest.
    fn median(shares: [f64; 2], canary: f64, most: u64, alpha: f64) -> u64 {
        let stop = |seed| given_up(seed, shares, canary, 50, most, alpha).unwrap_or(u64::MAX);
        let mut stops: Vec<u64> = (0..REPEATS).map(stop).collect();
        stops.sort_unstable();
        stops[stops.len() / 2]
    }

    #[test]
    fn equal_versions_are_rarely_told_apart_however_often_one_looks() {
        for share in [0.001, 0.02, 0.2] {
            let wrong = (0..REPEATS).filter(|&seed| given_up(seed, [share; 2], 0.1, 200, 20_000, ALPHA).is_some());
            let wrong = wrong.count() as f64 / REPEATS as f64;
            println!("{:.1} % errors in both: {:.1} % given up", share * 100.0, wrong * 100.0);
            assert!(wrong <= ALPHA, "{wrong} at {share}");
        }
    }

    #[test]
    fn worse_versions_are_soon_given_up() {
        for (worse, limit) in [(0.10, 1_500), (0.04, 8_000)] {
            let found = median([0.02, worse], 0.1, 40_000, ALPHA);
            println!("{:.0} % errors against 2 %, a tenth of the traffic: given up after {found}", worse * 100.0);
            assert!(found <= limit, "{found} for {worse}");
            for (canary, alpha) in [(0.01, ALPHA), (0.05, ALPHA), (0.1, ALPHA / 5.0)] {
                let found = median([0.02, worse], canary, 40_000, alpha);
                println!("  {:.0} % of the traffic, alpha {alpha}: {found}", canary * 100.0);
            }
        }
    }

    #[test]
    fn the_interval_holds_the_difference_at_every_look() {
        let mut random = StdRng::seed_from_u64(7);
        let mut missed = 0;
        for _ in 0..REPEATS {
            let mut seen = [Share::default(); 2];
            let shares = [0.05, 0.08];
            let mut out = false;
            for request in 1..=5_000 {
                for (arm, seen) in seen.iter_mut().enumerate() {
                    seen.of += 1;
                    seen.hits += u64::from(random.random_bool(shares[arm]));
                }
                if request % 100 == 0 {
                    let found = Difference::between(seen[0], seen[1], TEST).unwrap();
                    out |= (found.estimate - 0.03).abs() > found.radius;
                }
            }
            missed += u64::from(out);
        }
        assert!(missed as f64 <= ALPHA * REPEATS as f64, "{missed} of {REPEATS}");
    }

    #[test]
    fn nothing_seen_says_nothing() {
        let some = Share { hits: 1, of: 10 };
        assert_eq!(Difference::between(Share::default(), some, TEST), None);
        assert_eq!(Difference::between(some, Share::default(), TEST), None);
        assert_eq!(Difference::above(0.1, Share::default(), TEST), None);
    }

    #[test]
    fn large_differences_are_found_by_a_test_for_them() {
        let large = Test { size: 0.1, ..TEST };
        let above = |hits| Difference::above(0.1, Share { hits, of: 100 }, large).unwrap().is_larger(ALPHA);
        assert!(above(30) && !above(12));
        assert!(!Difference::above(0.1, Share { hits: 30, of: 100 }, TEST).unwrap().is_larger(ALPHA));
    }
}
