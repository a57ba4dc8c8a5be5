//! `Route`: who gets which version of a model.
//!
//! The choice follows from the rollout's id, the key and the weights alone, so every replica and every protocol makes the
//! same one. Raising the canary's weight only moves keys to the canary; a new id draws all of them anew.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::{error::Error, id::Version, metrics::Way};

/// All requests, in the unit of weights: parts per million.
pub const ALL: u32 = 1_000_000;

/// A share of the requests, in parts per million; at most [`ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Weight(u32);

/// Which of a model's versions a request got, as answers and metrics call it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    Stable,
    Canary,
    Shadow,
    /// A named arm of an A/B test.
    Arm(Arc<str>),
}

/// A version that gets a share of the requests instead of the stable one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    pub variant: Variant,
    pub version: Version,
    pub weight: Weight,
}

/// A version that gets copies of a share of the requests; nobody gets its answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shadow {
    pub version: Version,
    pub weight: Weight,
}

/// Where a request's key stands, so that whoever sends the same key gets the same version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Sticky {
    /// A header of REST, metadata of gRPC; in lower case.
    Header(Arc<str>),
    /// A parameter of the request.
    Parameter(Arc<str>),
    /// The contents of an input tensor.
    Input(Arc<str>),
}

/// How the requests for a model are divided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What keys are drawn by: `MODEL/rN`.
    pub id: Arc<str>,
    /// Gets what no arm gets.
    pub stable: Version,
    /// Their weights are at most [`ALL`] together.
    pub arms: Vec<Arm>,
    pub shadow: Option<Shadow>,
    /// Without it, the key is the request's id.
    pub sticky: Option<Sticky>,
}

/// What a route has for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice<'a> {
    pub variant: &'a Variant,
    pub version: &'a Version,
    /// Who gets a copy.
    pub shadow: Option<&'a Version>,
}

impl Weight {
    pub const NONE: Self = Self(0);
    pub const FULL: Self = Self(ALL);

    /// # Errors
    /// `InvalidArgument` when it is none from 0 to 100.
    pub fn from_percent(percent: f64) -> Result<Self, Error> {
        if !(0.0..=100.0).contains(&percent) {
            return Err(Error::invalid(format!("a weight must be 0 to 100 percent, got {percent}")));
        }
        Ok(Self((percent * f64::from(ALL) / 100.0).round() as u32))
    }

    pub fn percent(self) -> f64 {
        f64::from(self.0) * 100.0 / f64::from(ALL)
    }

    pub fn parts_per_million(self) -> u32 {
        self.0
    }
}

impl Variant {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Stable => "stable",
            Self::Canary => "canary",
            Self::Shadow => "shadow",
            Self::Arm(name) => name,
        }
    }

    /// How metrics call what was drawn.
    pub fn way(&self) -> Way {
        match self {
            Self::Stable => Way::Stable,
            Self::Canary => Way::Canary,
            Self::Shadow => Way::Shadow,
            Self::Arm(_) => Way::Arm,
        }
    }
}

impl Route {
    /// All requests to one version.
    pub fn to(id: Arc<str>, stable: Version) -> Self {
        Self { id, stable, arms: Vec::new(), shadow: None, sticky: None }
    }

    /// The version for the request with this key.
    pub fn choose(&self, key: &[u8]) -> Choice<'_> {
        let bucket = if self.is_plain() { 0 } else { bucket(&self.id, key) };
        let shadow = self.shadow.as_ref().filter(|shadow| bucket < shadow.weight.0).map(|shadow| &shadow.version);
        let mut end = 0;
        for Arm { variant, version, weight } in &self.arms {
            end += weight.0;
            if bucket < end {
                return Choice { variant, version, shadow };
            }
        }
        Choice { variant: &Variant::Stable, version: &self.stable, shadow }
    }

    /// Whether there is nothing to draw: every request goes to the stable version, and nowhere else.
    pub fn is_plain(&self) -> bool {
        self.arms.is_empty() && self.shadow.is_none()
    }

    /// Whether another route divides the same versions by the same key, in other shares at most.
    pub fn differs_by_weights(&self, other: &Self) -> bool {
        let weightless = |route: &Self| {
            let mut route = Self { id: "".into(), ..route.clone() };
            route.arms.iter_mut().for_each(|arm| arm.weight = Weight::NONE);
            route.shadow.iter_mut().for_each(|shadow| shadow.weight = Weight::NONE);
            route
        };
        weightless(self) == weightless(other)
    }

    /// Whether a version gets requests or copies of them.
    pub fn names(&self, version: &Version) -> bool {
        self.stable == *version
            || self.arms.iter().any(|arm| arm.version == *version)
            || self.shadow.as_ref().is_some_and(|shadow| shadow.version == *version)
    }

    /// What a version is called that a request asks for by its own name.
    pub fn variant_of(&self, version: &Version) -> &Variant {
        let arm = self.arms.iter().find(|arm| arm.version == *version);
        let shadow = self.shadow.as_ref().filter(|shadow| shadow.version == *version);
        arm.map(|arm| &arm.variant).or(shadow.map(|_| &Variant::Shadow)).unwrap_or(&Variant::Stable)
    }

    /// The version for a request that asks for a variant by name; no copy of it is made. `None` when there is none such.
    pub fn forced(&self, variant: &str) -> Option<Choice<'_>> {
        if variant == Variant::Stable.as_str() {
            return Some(Choice { variant: &Variant::Stable, version: &self.stable, shadow: None });
        }
        let arm = self.arms.iter().find(|arm| arm.variant.as_str() == variant)?;
        Some(Choice { variant: &arm.variant, version: &arm.version, shadow: None })
    }

    /// # Errors
    /// `InvalidArgument` saying what is wrong: weights above 100 percent together, or an arm that is there twice.
    pub fn check(&self) -> Result<(), Error> {
        let sum: u64 = self.arms.iter().map(|arm| u64::from(arm.weight.0)).sum();
        if sum > u64::from(ALL) {
            let percent = sum as f64 * 100.0 / f64::from(ALL);
            return Err(Error::invalid(format!("the weights must be 100 percent together at most, got {percent}")));
        }
        for (index, arm) in self.arms.iter().enumerate() {
            let name = arm.variant.as_str();
            let taken = matches!(arm.variant, Variant::Stable | Variant::Shadow)
                || matches!(&arm.variant, Variant::Arm(name) if ["stable", "canary", "shadow", ""].contains(&&**name));
            if taken {
                return Err(Error::invalid(format!("an arm cannot be called '{name}'")));
            }
            if self.arms[..index].iter().any(|other| other.variant == arm.variant) {
                return Err(Error::invalid(format!("there are two arms '{name}'")));
            }
        }
        Ok(())
    }
}

/// Where a key falls, from 0 to [`ALL`] − 1: xxh3-64 with seed 0 of the id, a zero byte and the key.
fn bucket(id: &str, key: &[u8]) -> u32 {
    let mut hasher = XxHash3_64::new();
    for part in [id.as_bytes(), &[0], key] {
        std::hash::Hasher::write(&mut hasher, part);
    }
    let hash = std::hash::Hasher::finish(&hasher);
    ((u128::from(hash) * u128::from(ALL)) >> 64) as u32
}

impl FromStr for Sticky {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            let text = crate::error::shorten(text);
            Error::invalid(format!("sticky must be header:NAME, param:NAME or input:NAME, got '{text}'"))
        };
        let (kind, name) = text.split_once(':').filter(|(_, name)| !name.is_empty()).ok_or_else(wrong)?;
        match kind {
            "header" => Ok(Self::Header(name.to_ascii_lowercase().into())),
            "param" => Ok(Self::Parameter(name.into())),
            "input" => Ok(Self::Input(name.into())),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Sticky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Parameter(name) => write!(f, "param:{name}"),
            Self::Input(name) => write!(f, "input:{name}"),
        }
    }
}

impl TryFrom<String> for Sticky {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Sticky> for String {
    fn from(sticky: Sticky) -> Self {
        sticky.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    fn canary(percent: f64) -> Route {
        let arm =
            Arm { variant: Variant::Canary, version: version("2"), weight: Weight::from_percent(percent).unwrap() };
        Route { arms: vec![arm], ..Route::to("iris-rf/r7".into(), version("1")) }
    }

    #[test]
    fn keys_fall_where_every_replica_has_them() {
        let golden = [
            ("iris-rf/r7", "user-1", 54_492),
            ("iris-rf/r7", "user-2", 7_062),
            ("iris-rf/r7", "user-42", 504_110),
            ("iris-rf/r8", "user-42", 633_277),
        ];
        for (id, key, expected) in golden {
            assert_eq!(bucket(id, key.as_bytes()), expected, "{id} {key}");
        }
    }

    #[test]
    fn shares_are_as_wanted_and_a_key_keeps_its_version() {
        for percent in [1.0, 5.0, 10.0, 50.0] {
            let route = canary(percent);
            let chosen = (0..100_000).filter(|key: &u32| *route.choose(&key.to_le_bytes()).variant == Variant::Canary);
            let share = chosen.count() as f64 / 1000.0;
            assert!((share - percent).abs() < 0.5, "{share} for {percent}");
        }
        assert_eq!(canary(0.0).choose(b"k").version, &version("1"));
        assert_eq!(canary(100.0).choose(b"k").version, &version("2"));
    }

    #[test]
    fn arms_divide_what_they_are_given_and_the_rest_is_stable() {
        let arm = |name: &str, percent| Arm {
            variant: Variant::Arm(name.into()),
            version: version(name),
            weight: Weight::from_percent(percent).unwrap(),
        };
        let route = Route { arms: vec![arm("a", 20.0), arm("b", 30.0)], ..Route::to("m/r1".into(), version("1")) };
        let mut counts = std::collections::BTreeMap::new();
        for key in 0..100_000_u32 {
            *counts.entry(route.choose(&key.to_le_bytes()).variant.as_str().to_owned()).or_insert(0) += 1;
        }
        for (name, share) in [("a", 20_000_i32), ("b", 30_000), ("stable", 50_000)] {
            assert!((counts[name] - share).abs() < 1000, "{counts:?}");
        }
        assert_eq!(route.forced("b").unwrap().version, &version("b"));
        assert_eq!(route.forced("stable").unwrap().version, &version("1"));
        assert!(route.forced("canary").is_none());
    }

    #[test]
    fn copies_are_sampled_beside_the_answer() {
        let shadow = Shadow { version: version("2"), weight: Weight::from_percent(25.0).unwrap() };
        let route = Route { shadow: Some(shadow), ..Route::to("m/r1".into(), version("1")) };
        let choices: Vec<Choice<'_>> = (0..10_000_u32).map(|key| route.choose(&key.to_le_bytes())).collect();
        assert!(choices.iter().all(|choice| *choice.variant == Variant::Stable));
        let copies = choices.iter().filter(|choice| choice.shadow.is_some()).count();
        assert!((2300..2700).contains(&copies), "{copies}");
    }

    #[test]
    fn impossible_routes_are_refused() {
        let mut route = canary(60.0);
        route.arms.push(Arm { variant: Variant::Arm("b".into()), ..route.arms[0].clone() });
        assert!(route.check().unwrap_err().message.contains("100 percent together at most, got 120"));
        route.arms[1] = Arm { weight: Weight::NONE, ..route.arms[0].clone() };
        assert!(route.check().unwrap_err().message.contains("two arms 'canary'"));
        route.arms[1].variant = Variant::Arm("stable".into());
        assert!(route.check().unwrap_err().message.contains("cannot be called 'stable'"));
        assert!(Weight::from_percent(100.1).is_err() && Weight::from_percent(f64::NAN).is_err());
        for text in ["header", "header:", "cookie:x", ""] {
            assert!(text.parse::<Sticky>().unwrap_err().message.contains("header:NAME"), "{text}");
        }
        assert_eq!("header:X-User".parse::<Sticky>().unwrap().to_string(), "header:x-user");
    }

    proptest! {
        #[test]
        fn raising_the_weight_only_moves_keys_to_the_canary(key: Vec<u8>, low in 0.0..100.0, more in 0.0..100.0) {
            let high = f64::min(low + more, 100.0);
            let (before, after) = (canary(low), canary(high));
            let was_canary = *before.choose(&key).variant == Variant::Canary;
            prop_assert!(!was_canary || *after.choose(&key).variant == Variant::Canary);
        }
    }
}
