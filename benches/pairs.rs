//! Things measured in turn, within seconds of each other: a shared machine is never the same for long, and only what
//! was found in one go is compared.

use anyhow::Result;

use crate::machine::Usage;

/// A pair is void above this share of time that the hypervisor gave to others.
pub const MAX_STOLEN: f64 = 0.03;

/// What was found, and under which conditions.
pub struct Measured<T> {
    pub value: T,
    pub usage: Usage,
    /// Whether something other than the hypervisor spoiled it.
    pub spoiled: bool,
}

/// What a pair says of one thing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    pub number: f64,
    /// Whether the pair is not void.
    pub counts: bool,
}

impl<T> Measured<T> {
    pub fn map<U>(self, value: impl FnOnce(T) -> U) -> Measured<U> {
        Measured { value: value(self.value), usage: self.usage, spoiled: self.spoiled }
    }

    /// Two things that were measured one after the other, and count only together.
    pub fn and<U>(self, other: Measured<U>) -> Measured<(T, U)> {
        let seconds = self.usage.seconds + other.usage.seconds;
        let share = |of: fn(&Usage) -> f64| {
            (of(&self.usage) * self.usage.seconds + of(&other.usage) * other.usage.seconds) / seconds
        };
        let usage = Usage {
            seconds,
            server: self.usage.server + other.usage.server,
            own: self.usage.own + other.usage.own,
            stolen: share(|usage| usage.stolen),
            foreign: share(|usage| usage.foreign),
        };
        let spoiled = self.spoiled || other.spoiled;
        Measured { value: (self.value, other.value), usage, spoiled }
    }

    fn counts(&self) -> bool {
        self.usage.stolen <= MAX_STOLEN && !self.spoiled
    }
}

/// Measurements of two things, the one that comes first alternating, so that drift favours neither.
pub struct Pairs<A, B>(Vec<(Measured<A>, Measured<B>)>);

impl<A, B> Pairs<A, B> {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Measures both once more.
    ///
    /// # Errors
    /// When either fails.
    pub fn take(
        &mut self,
        ours: impl FnOnce() -> Result<Measured<A>>,
        theirs: impl FnOnce() -> Result<Measured<B>>,
    ) -> Result<()> {
        if self.0.len().is_multiple_of(2) {
            let ours = ours()?;
            self.0.push((ours, theirs()?));
        } else {
            let theirs = theirs()?;
            self.0.push((ours()?, theirs));
        }
        Ok(())
    }

    /// A number for each pair.
    pub fn values(&self, number: impl Fn(&A, &B) -> f64) -> Vec<Value> {
        let of = |(ours, theirs): &(Measured<A>, Measured<B>)| Value {
            number: number(&ours.value, &theirs.value),
            counts: ours.counts() && theirs.counts(),
        };
        self.0.iter().map(of).collect()
    }

    /// The shares of the machine that other processes took.
    pub fn foreign(&self) -> impl Iterator<Item = f64> {
        self.0.iter().flat_map(|(ours, theirs)| [ours.usage.foreign, theirs.usage.foreign])
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn measured(value: f64, stolen: f64, spoiled: bool) -> Measured<f64> {
        let usage = Usage { seconds: 1.0, server: 1.0, own: 0.1, stolen, foreign: 0.5 };
        Measured { value, usage, spoiled }
    }

    #[test]
    fn the_first_one_alternates_and_stolen_time_voids() {
        let order = RefCell::new(String::new());
        let mut pairs = Pairs::new();
        for (stolen, spoiled) in [(0.0, false), (0.029, false), (0.031, false), (0.0, true)] {
            let ours = || {
                order.borrow_mut().push('a');
                Ok(measured(6.0, stolen, false))
            };
            let theirs = || {
                order.borrow_mut().push('b');
                Ok(measured(3.0, 0.0, spoiled))
            };
            pairs.take(ours, theirs).unwrap();
        }
        assert_eq!(order.into_inner(), "abbaabba");
        let values = pairs.values(|ours, theirs| ours / theirs);
        assert_eq!(values, [true, true, false, false].map(|counts| Value { number: 2.0, counts }));
        assert_eq!(pairs.foreign().count(), 8);
    }

    #[test]
    fn what_was_measured_together_counts_together() {
        let calm = || measured(1.0, 0.0, false);
        assert!(calm().and(measured(2.0, 0.05, false)).counts(), "the share of both together is 2.5 %");
        assert!(!calm().and(measured(2.0, 0.07, false)).counts());
        assert!(!measured(1.0, 0.0, true).and(calm()).counts());
        let both = calm().and(measured(2.0, 0.0, false));
        assert_eq!((both.value, both.usage.seconds, both.usage.own), ((1.0, 2.0), 2.0, 0.2));
    }
}
