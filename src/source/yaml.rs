//! YAML as JSON's values: what front matter, `MLmodel` and pointer files say, of bounded depth and size.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

/// Lists in lists; more than any of these files has.
const MAX_DEPTH: usize = 64;
/// Values and bytes of texts, with those that aliases repeat: a few lines of them can stand for gigabytes.
const MAX_COST: usize = 8 << 20;
/// What a value costs beside its text.
const VALUE_COST: usize = 16;

/// The first document of a text, its plain words read as YAML's core schema has them. Numbers that JSON has not stay texts.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(text: &str) -> Result<Value, String> {
    let mut reading = Reading::default();
    for event in Parser::new_from_str(text) {
        let (event, _) = event.map_err(|error| error.to_string())?;
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                // A tag of its own makes a text of it, or something that is not ours to make.
                let is_plain = style == ScalarStyle::Plain && tag.is_none();
                let value = if is_plain { plain(&text) } else { Value::String(text.into_owned()) };
                reading.put(value, anchor)?;
            }
            Event::Alias(anchor) => {
                let value = reading.anchors.get(&anchor).ok_or("an alias stands for what holds it")?;
                // What is placed may hold aliases itself, so levels add up.
                if reading.open.len() + depth(value) > MAX_DEPTH {
                    return Err(too_deep());
                }
                let value = value.clone();
                reading.spend(cost(&value))?;
                reading.place(value);
            }
            Event::SequenceStart(anchor, _) => reading.open(Open::List(Vec::new()), anchor)?,
            Event::MappingStart(anchor, _) => reading.open(Open::Map(Map::new(), None), anchor)?,
            Event::SequenceEnd | Event::MappingEnd => reading.close()?,
            Event::DocumentEnd => break,
            _ => {}
        }
    }
    Ok(reading.document.unwrap_or_default())
}

#[derive(Default)]
struct Reading {
    open: Vec<(Open, usize)>,
    anchors: BTreeMap<usize, Value>,
    document: Option<Value>,
    spent: usize,
}

enum Open {
    List(Vec<Value>),
    /// With the key whose value comes next.
    Map(Map<String, Value>, Option<String>),
}

impl Reading {
    fn spend(&mut self, cost: usize) -> Result<(), String> {
        self.spent = self.spent.saturating_add(cost);
        if self.spent > MAX_COST { Err(format!("it stands for more than {MAX_COST} bytes")) } else { Ok(()) }
    }

    fn open(&mut self, open: Open, anchor: usize) -> Result<(), String> {
        self.spend(VALUE_COST)?;
        self.open.push((open, anchor));
        if self.open.len() > MAX_DEPTH { Err(too_deep()) } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), String> {
        let Some((open, anchor)) = self.open.pop() else { return Ok(()) };
        let value = match open {
            Open::List(list) => Value::Array(list),
            Open::Map(map, _) => Value::Object(map),
        };
        self.remember(&value, anchor)?;
        self.place(value);
        Ok(())
    }

    fn put(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        self.spend(cost(&value))?;
        self.remember(&value, anchor)?;
        self.place(value);
        Ok(())
    }

    /// Zero is no anchor.
    fn remember(&mut self, value: &Value, anchor: usize) -> Result<(), String> {
        if anchor != 0 {
            self.spend(cost(value))?;
            self.anchors.insert(anchor, value.clone());
        }
        Ok(())
    }

    fn place(&mut self, value: Value) {
        match self.open.last_mut() {
            None => drop(self.document.get_or_insert(value)),
            Some((Open::List(list), _)) => list.push(value),
            Some((Open::Map(map, key), _)) => match key.take() {
                Some(key) => drop(map.insert(key, value)),
                None => *key = Some(as_key(value)),
            },
        }
    }
}

fn as_key(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

fn cost(value: &Value) -> usize {
    VALUE_COST
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(cost).sum(),
            Value::Object(map) => map.iter().map(|(key, value)| key.len() + cost(value)).sum(),
            _ => 0,
        }
}

/// Lists and maps in one another. No value that was read has more than `MAX_DEPTH`.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or_default(),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or_default(),
        _ => 0,
    }
}

fn too_deep() -> String {
    format!("it is more than {MAX_DEPTH} levels deep")
}

/// A word without quotes.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    // Rust reads `inf` and `nan` as numbers, which are words here.
    let is_number =
        text.trim_start_matches(['+', '-']).starts_with(|first: char| first.is_ascii_digit() || first == '.')
            && !text.ends_with(|last: char| last.is_ascii_alphabetic());
    let whole = text.parse::<i64>().map(Number::from).or_else(|_| text.parse::<u64>().map(Number::from));
    let number = whole.ok().or_else(|| Number::from_f64(text.parse().ok()?)).filter(|_| is_number);
    number.map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_are_what_they_look_like() {
        let text = "a: 1\nb: -2.5e3\nc: true\nd: ~\ne:\nf: '1'\ng: nan\nh: .inf\ni: 0x1\nj: v1.2\nk: 1.0.0\nl: inf\n\
                    m: 18446744073709551615\nn: !!str 7\no: |\n  two\n  lines\n3: [x, {y: z}]\np: 2024-01-02\n";
        assert_eq!(
            read(text).unwrap(),
            json!({
                "a": 1, "b": -2500.0, "c": true, "d": null, "e": null, "f": "1", "g": "nan", "h": ".inf", "i": "0x1",
                "j": "v1.2", "k": "1.0.0", "l": "inf", "m": u64::MAX, "n": "7", "o": "two\nlines\n",
                "3": ["x", {"y": "z"}], "p": "2024-01-02",
            })
        );
        assert_eq!(read("").unwrap(), Value::Null);
        assert_eq!(read("one\n---\nother: [").unwrap(), json!("one"));
    }

    #[test]
    fn aliases_repeat_and_end_somewhere() {
        assert_eq!(
            read("a: &x {b: 1}\nc: *x\nd: [*x]").unwrap(),
            json!({"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}]})
        );
        assert!(read("a: &x [*x]").is_err());
        let mut laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
        for level in 1..12 {
            let before = format!("*a{}", level - 1);
            laughs += &format!("a{level}: &a{level} [{}]\n", [before.as_str(); 10].join(", "));
        }
        assert!(read(&laughs).unwrap_err().starts_with("it stands for more than"));
        assert!(read(&"[".repeat(100)).unwrap_err().contains("more than 64 levels deep"));
        assert!(read("a: [").is_err() && read("a: *nobody").is_err());
    }

    #[test]
    fn levels_of_what_aliases_repeat_add_up() {
        let nested = |levels: usize, inner: &str| format!("{}{inner}{}", "[".repeat(levels), "]".repeat(levels));
        let chain = |levels: usize| {
            let [first, second, third] = ["1", "*a", "*b"].map(|inner| nested(levels, inner));
            read(&format!("- &a {first}\n- &b {second}\n- &c {third}\n"))
        };
        assert!(chain(40).unwrap_err().contains("more than 64 levels deep"));
        assert!(chain(21).is_ok());
        assert!(chain(22).is_err());
    }
}
