//! Things measured in turn, within seconds of each other: a shared machine is never the same for long, and only what
//! was found in one go is compared.

use anyhow::Result;

use crate::machine::Usage;

/// What is measured is void above this share of time that the hypervisor gave to others.
const MAX_STOLEN: f64 = 0.03;
/// With more than this share of the cores in other hands, two programs do not lose alike: the one with more threads
/// gets more of what is left.
const MAX_FOREIGN: f64 = 0.05;
/// What shall not be void is measured so often at most.
const ATTEMPTS: usize = 3;

/// What was found, and under which conditions.
pub struct Measured<T> {
    pub value: T,
    pub usage: Usage,
    /// What other than the machine spoiled it.
    spoiled: Option<String>,
}

/// What a pair says of one thing.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    pub number: f64,
    /// Why it does not count.
    pub void: Option<String>,
}

/// Why nothing counts that was found while the cores were used like this.
pub fn disturbance(usage: &Usage) -> Option<String> {
    stolen(usage).or_else(|| {
        let foreign = 100.0 * usage.foreign;
        (usage.foreign > MAX_FOREIGN).then(|| format!("other processes took {foreign:.0} % of the cores"))
    })
}

/// The same where what is measured is somebody else's process itself.
pub fn stolen(usage: &Usage) -> Option<String> {
    (usage.stolen > MAX_STOLEN).then(|| format!("{:.0} % of the time was stolen", 100.0 * usage.stolen))
}

/// Why a figure is void of whose parts, which are called `what`, some are: when they are more than half of them.
pub fn most_are_void<'a>(what: &str, parts: impl IntoIterator<Item = Option<&'a String>>) -> Option<String> {
    let parts: Vec<_> = parts.into_iter().collect();
    let reasons: Vec<_> = parts.iter().flatten().collect();
    let first = reasons.first().filter(|_| reasons.len() * 2 > parts.len())?;
    Some(format!("{} of {} {what} were void, the first because {first}", reasons.len(), parts.len()))
}

/// Measures until the result counts, or three times; then it is the last one, which is void.
///
/// # Errors
/// When measuring fails.
pub fn until_it_counts<T>(mut measure: impl FnMut() -> Result<Measured<T>>) -> Result<Measured<T>> {
    let mut found = measure()?;
    for _ in 1..ATTEMPTS {
        if found.void().is_none() {
            break;
        }
        found = measure()?;
    }
    Ok(found)
}

impl<T> Measured<T> {
    pub fn new(value: T, usage: Usage) -> Self {
        Self { value, usage, spoiled: None }
    }

    /// The same, void for the reason `spoiled` if there is one.
    pub fn unless(self, spoiled: Option<String>) -> Self {
        Self { spoiled: self.spoiled.or(spoiled), ..self }
    }

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
        Measured { value: (self.value, other.value), usage, spoiled: self.spoiled.or(other.spoiled) }
    }

    /// Why it does not count.
    pub fn void(&self) -> Option<String> {
        self.spoiled.clone().or_else(|| disturbance(&self.usage))
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
            void: ours.void().or_else(|| theirs.void()),
        };
        self.0.iter().map(of).collect()
    }

    /// The pairs that count; when more than half of them are void, all of them, and why.
    pub fn counted(&self) -> (Vec<(&A, &B)>, Option<String>) {
        let voids: Vec<_> = self.0.iter().map(|(ours, theirs)| ours.void().or_else(|| theirs.void())).collect();
        let void = most_are_void("pairs", voids.iter().map(Option::as_ref));
        let counted = self.0.iter().zip(&voids).filter(|(_, spoiled)| spoiled.is_none() || void.is_some());
        (counted.map(|((ours, theirs), _)| (&ours.value, &theirs.value)).collect(), void)
    }

    /// The shares of the cores that other processes took.
    pub fn foreign(&self) -> impl Iterator<Item = f64> {
        self.0.iter().flat_map(|(ours, theirs)| [ours.usage.foreign, theirs.usage.foreign])
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn measured(value: f64, stolen: f64, spoiled: bool) -> Measured<f64> {
        let usage = Usage { seconds: 1.0, server: 1.0, own: 0.1, stolen, foreign: 0.02 };
        Measured::new(value, usage).unless(spoiled.then(|| "of noise".to_owned()))
    }

    #[test]
    fn the_first_one_alternates_and_voids_have_their_reason() {
        let order = RefCell::new(String::new());
        let mut pairs = Pairs::new();
        for (stolen, spoiled) in [(0.0, false), (0.029, false), (0.041, false), (0.0, true)] {
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
        assert!(values.iter().all(|value| value.number == 2.0), "{values:?}");
        let voids: Vec<_> = values.iter().map(|value| value.void.as_deref()).collect();
        assert_eq!(voids, [None, None, Some("4 % of the time was stolen"), Some("of noise")]);
        assert_eq!(pairs.foreign().count(), 8);
        assert_eq!((pairs.counted().0.len(), pairs.counted().1), (2, None));
        pairs.take(|| Ok(measured(6.0, 0.5, false)), || Ok(measured(3.0, 0.0, false))).unwrap();
        let (counted, void) = pairs.counted();
        assert!(counted.len() == 5 && void.is_some_and(|reason| reason.starts_with("3 of 5 pairs")));
    }

    #[test]
    fn what_was_measured_together_counts_together() {
        let calm = || measured(1.0, 0.0, false);
        let counts = |both: Measured<(f64, f64)>| both.void().is_none();
        assert!(counts(calm().and(measured(2.0, 0.05, false))), "the share of both together is 2.5 %");
        assert!(!counts(calm().and(measured(2.0, 0.07, false))));
        assert!(!counts(measured(1.0, 0.0, true).and(calm())));
        let both = calm().and(measured(2.0, 0.0, false));
        assert_eq!((both.value, both.usage.seconds, both.usage.own), ((1.0, 2.0), 2.0, 0.2));
    }

    #[test]
    fn more_than_half_void_are_too_many() {
        let (fine, void) = (None, Some("of noise".to_owned()));
        let most = |parts: &[&Option<String>]| most_are_void("runs", parts.iter().map(|part| part.as_ref()));
        assert_eq!(most(&[&fine, &void]), None);
        assert_eq!(most(&[]), None);
        let reason = most(&[&void, &fine, &void]).unwrap();
        assert_eq!(reason, "2 of 3 runs were void, the first because of noise");
        let taken = Usage { foreign: 0.5, ..Usage::default() };
        assert_eq!((stolen(&taken), disturbance(&taken).is_some()), (None, true));
    }

    #[test]
    fn what_is_void_is_measured_again_but_not_for_ever() {
        let attempts = |voids: usize| {
            let mut count = 0;
            let found = until_it_counts(|| {
                count += 1;
                Ok(measured(count as f64, 0.0, count <= voids))
            });
            (found.unwrap().value, count)
        };
        assert_eq!([attempts(0), attempts(1), attempts(9)], [(1.0, 1), (2.0, 2), (3.0, 3)]);
    }
}
