//! What a registry asks of whoever has not said who he is: the header `WWW-Authenticate`.

/// One way to answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Challenge {
    pub scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The challenges in a header, which may be several, with commas between them and between their parameters.
    pub fn read(header: &str) -> Vec<Self> {
        let mut challenges: Vec<Self> = Vec::new();
        let mut rest = header;
        loop {
            rest = rest.trim_start_matches([' ', ',', '\t']);
            if rest.is_empty() {
                return challenges;
            }
            let end = rest.find([' ', ',', '=']).unwrap_or(rest.len());
            let word = &rest[..end];
            match (rest[end..].strip_prefix('='), challenges.last_mut()) {
                (Some(after), Some(challenge)) => {
                    let (value, after) = value(after);
                    challenge.parameters.push((word.to_ascii_lowercase(), value));
                    rest = after;
                }
                // A parameter of nothing.
                (Some(after), None) => rest = value(after).1,
                (None, _) => {
                    challenges.push(Self { scheme: word.to_owned(), parameters: Vec::new() });
                    rest = &rest[end..];
                }
            }
        }
    }

    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A value, in quotes or up to the next comma or space, and what follows it.
fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
            letter => value.push(letter),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_have_a_scheme_and_parameters() {
        let header = r#"Bearer realm="https://auth/token",service="registry, or so",scope="repository:a/b:pull,push""#;
        let [bearer] = <[Challenge; 1]>::try_from(Challenge::read(header)).unwrap();
        assert_eq!(bearer.scheme, "Bearer");
        assert_eq!(bearer.parameter("realm"), Some("https://auth/token"));
        assert_eq!(bearer.parameter("service"), Some("registry, or so"));
        assert_eq!(bearer.parameter("scope"), Some("repository:a/b:pull,push"));
        assert_eq!(bearer.parameter("error"), None);

        let both = Challenge::read(r#"Basic Realm="a \"b\"", Negotiate, Bearer realm=https://x/y?z=1 , service=s"#);
        let schemes: Vec<&str> = both.iter().map(|challenge| challenge.scheme.as_str()).collect();
        assert_eq!(schemes, ["Basic", "Negotiate", "Bearer"]);
        assert_eq!(both[0].parameter("realm"), Some(r#"a "b""#));
        assert_eq!(both[2].parameter("realm"), Some("https://x/y?z=1"));
        assert_eq!(both[2].parameter("service"), Some("s"));
    }

    #[test]
    fn any_text_can_be_read() {
        for text in ["", ",,", "=", "a=\"", "\"", "Bearer realm=\"ü\\", "=,=", "é"] {
            Challenge::read(text);
        }
    }
}
