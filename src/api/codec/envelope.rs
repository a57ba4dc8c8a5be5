//! A REST request's JSON, taken apart into the texts of its members without reading what they mean.
//!
//! One pass checks the whole text and finds where everything is, in whatever order it comes. Members that mean nothing
//! here are passed over; those that do may come once.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{Parameter, Parameters};
use crate::{
    error::{Error, abridge},
    id::shorten,
};

/// More tensors than any graph has; `{}` takes thirty times its length in memory before it is found to be no tensor.
const MAX_TENSORS: usize = 4096;

pub(super) const INPUT_MEMBERS: [&str; 5] = ["name", "datatype", "shape", "parameters", "data"];
const OUTPUT_MEMBERS: [&str; 2] = ["name", "parameters"];

/// Where in the request something stands, `inputs[0]` for instance.
#[derive(Clone, Copy)]
pub(super) struct Place(pub(super) &'static str, pub(super) usize);

impl Place {
    /// What stands there: "input" or "output".
    pub(super) fn kind(self) -> &'static str {
        self.0.trim_end_matches('s')
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.0, self.1)
    }
}

/// The texts of an object's members in the order of their names; `None` for what is absent or null.
pub(super) type Members<'a, const N: usize> = [Option<&'a RawValue>; N];

/// A request taken apart.
#[derive(Default)]
pub(super) struct Envelope<'a> {
    pub(super) id: Option<&'a RawValue>,
    pub(super) parameters: Option<&'a RawValue>,
    pub(super) inputs: Option<Vec<Members<'a, 5>>>,
    pub(super) outputs: Option<Vec<Members<'a, 2>>>,
}

impl<'a> Envelope<'a> {
    pub(super) fn parse(json: &'a [u8]) -> Result<Self, Error> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        deserializer
            .deserialize_map(EnvelopeVisitor)
            .and_then(|envelope| deserializer.end().map(|()| envelope))
            .map_err(|error| {
                Error::invalid(format!("the request is not the JSON it should be: {}", abridge(&error.to_string())))
            })
    }
}

struct EnvelopeVisitor;

impl<'de> Visitor<'de> for EnvelopeVisitor {
    type Value = Envelope<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request to be an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut envelope = Envelope::default();
        let mut seen = [false; 4];
        const NAMES: [&str; 4] = ["id", "parameters", "inputs", "outputs"];
        while let Some(member) = map.next_key_seed(MemberName(&NAMES))? {
            let Some(member) = member else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(&mut seen[member], true) {
                return Err(de::Error::duplicate_field(NAMES[member]));
            }
            match NAMES[member] {
                "id" => envelope.id = map.next_value()?,
                "parameters" => envelope.parameters = map.next_value()?,
                "inputs" => envelope.inputs = Some(map.next_value_seed(Objects("inputs", &INPUT_MEMBERS))?),
                _ => envelope.outputs = Some(map.next_value_seed(Objects("outputs", &OUTPUT_MEMBERS))?),
            }
        }
        Ok(envelope)
    }
}

/// Reads an array of objects; null counts as an empty one.
pub(super) struct Objects<const N: usize>(pub(super) &'static str, pub(super) &'static [&'static str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Objects<N> {
    type Value = Vec<Members<'de, N>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Objects<N> {
    type Value = Vec<Members<'de, N>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to be an array of objects", self.0)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut objects = Vec::new();
        while let Some(object) = seq.next_element_seed(Object(Place(self.0, objects.len()), self.1))? {
            if objects.len() == MAX_TENSORS {
                return Err(de::Error::custom(format_args!("{} has more than {MAX_TENSORS} entries", self.0)));
            }
            objects.push(object);
        }
        Ok(objects)
    }
}

/// Reads the members of one object that have a meaning here.
struct Object<const N: usize>(Place, &'static [&'static str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Object<N> {
    type Value = Members<'de, N>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Object<N> {
    type Value = Members<'de, N>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to be an object", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = [None; N];
        let mut seen = [false; N];
        while let Some(member) = map.next_key_seed(MemberName(self.1))? {
            let Some(member) = member else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(&mut seen[member], true) {
                return Err(de::Error::custom(format_args!("{} has '{}' twice", self.0, self.1[member])));
            }
            members[member] = map.next_value()?;
        }
        Ok(members)
    }
}

/// Finds a member's name among those that are known.
struct MemberName(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for MemberName {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for MemberName {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|known| *known == name))
    }
}

pub(super) struct ParameterMap(pub(super) Parameters);

impl<'de> Deserialize<'de> for ParameterMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ParameterMapVisitor).map(Self)
    }
}

struct ParameterMapVisitor;

impl<'de> Visitor<'de> for ParameterMapVisitor {
    type Value = Parameters;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut parameters = Parameters::new();
        while let Some(name) = map.next_key::<String>()? {
            let wrong = |error| de::Error::custom(format_args!("'{}': {error}", shorten(&name)));
            let value = map.next_value::<Parameter>().map_err(wrong)?;
            if parameters.contains_key(&name) {
                return Err(de::Error::custom(format_args!("'{}' is given twice", shorten(&name))));
            }
            parameters.insert(name, value);
        }
        Ok(parameters)
    }
}

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ParameterVisitor)
    }
}

struct ParameterVisitor;

impl Visitor<'_> for ParameterVisitor {
    type Value = Parameter;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a number or a boolean")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Parameter::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Parameter::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(i64::try_from(value).map_or(Parameter::Uint(value), Parameter::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Parameter::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Parameter::String(value.to_owned()))
    }
}
