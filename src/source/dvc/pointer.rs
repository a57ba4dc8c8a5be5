//! A pointer file, `*.dvc`: what DVC tracks, by its MD5.

use saphyr_parser::{Event, Parser};

/// What is tracked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pointer {
    /// In hexadecimal; that of a folder ends in `.dir`.
    pub md5: String,
    /// As it lies in the checkout, beside the pointer.
    pub path: String,
    /// The remote that it is in, when that is not the usual one.
    pub remote: Option<String>,
    /// Whether the MD5 is that of the bytes: before DVC 3.0, that of a text is not.
    pub is_verifiable: bool,
}

/// What is around a text in YAML.
enum Around {
    /// With the key whose value comes next.
    Map(Option<String>),
    List,
}

impl Pointer {
    /// # Errors
    /// What is wrong with the text, when it is no YAML or tracks not just one thing by its MD5.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut around: Vec<Around> = Vec::new();
        let mut found: Vec<Self> = Vec::new();
        for event in Parser::new_from_str(text) {
            let (event, _) = event.map_err(|error| error.to_string())?;
            match event {
                Event::Scalar(text, ..) => match around.last_mut() {
                    Some(Around::Map(key @ None)) => *key = Some(text.into_owned()),
                    _ => {
                        if let Some(out) = found.last_mut() {
                            out.note(&around, &text);
                        }
                        end_of_value(&mut around);
                    }
                },
                Event::Alias(_) => end_of_value(&mut around),
                Event::MappingStart(..) => {
                    if let [Around::Map(Some(outs)), Around::List] = around.as_slice()
                        && outs == "outs"
                    {
                        found.push(Self::default());
                    }
                    around.push(Around::Map(None));
                }
                Event::SequenceStart(..) => around.push(Around::List),
                Event::MappingEnd | Event::SequenceEnd => {
                    around.pop();
                    end_of_value(&mut around);
                }
                _ => {}
            }
        }
        let [pointer] = <[Self; 1]>::try_from(found)
            .map_err(|found| format!("expected one entry in outs, found {}", found.len()))?;
        let hex = pointer.md5.strip_suffix(".dir").unwrap_or(&pointer.md5);
        if hex.len() != 32 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(
                "expected an md5 in outs: what a remote keeps versions of by itself is not read here".to_owned()
            );
        }
        Ok(pointer)
    }

    /// Takes note of a value of its own.
    fn note(&mut self, around: &[Around], value: &str) {
        let [Around::Map(_), Around::List, Around::Map(Some(key))] = around else { return };
        match key.as_str() {
            "md5" => self.md5 = value.to_ascii_lowercase(),
            "path" => value.clone_into(&mut self.path),
            "remote" => self.remote = Some(value.to_owned()),
            "hash" => self.is_verifiable = value == "md5",
            _ => {}
        }
    }
}

/// What stands for a key has come.
fn end_of_value(around: &mut [Around]) {
    if let Some(Around::Map(key)) = around.last_mut() {
        *key = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_tracks_one_thing_by_its_md5() {
        let text = "outs:\n- md5: d921513cf1669fcd2448587857dad7a9\n  size: 72638\n  hash: md5\n  path: iris.onnx\n";
        let pointer = Pointer::read(text).unwrap();
        assert_eq!((pointer.md5.as_str(), pointer.path.as_str()), ("d921513cf1669fcd2448587857dad7a9", "iris.onnx"));
        assert!(pointer.is_verifiable && pointer.remote.is_none());

        let text = "# comment\nmd5: 0\nouts:\n  - {md5: \"ff1afbd6308bb1d9b8edde3e127a483d.dir\", nfiles: 2, path: 'a b', \
                    remote: other, meta: {md5: 1}}\nmeta: {md5: 2}\n";
        let pointer = Pointer::read(text).unwrap();
        assert_eq!(pointer.md5, "ff1afbd6308bb1d9b8edde3e127a483d.dir");
        assert_eq!((pointer.path.as_str(), pointer.remote.as_deref()), ("a b", Some("other")));
        assert!(!pointer.is_verifiable);
    }

    #[test]
    fn other_files_are_no_pointers() {
        let said = |text: &str| Pointer::read(text).unwrap_err();
        assert_eq!(said(""), "expected one entry in outs, found 0");
        assert_eq!(said("outs: [{md5: a}, {md5: b}]"), "expected one entry in outs, found 2");
        assert!(said("outs: [{path: a, files: []}]").starts_with("expected an md5"));
        assert!(said("outs:\n- md5: ../../../etc/passwd\n").starts_with("expected an md5"));
        assert!(!said("outs: [").is_empty());
    }
}
