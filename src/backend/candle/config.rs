//! `Architecture`: what `config.json` says of an encoder, read and checked before any tensor is.
//!
//! The keys are those of the Hugging Face format, and so are the values of those left out.

use std::{io::Read, path::Path};

use serde_json::{Map, Value};

use crate::error::{Error, shorten};

pub const FILE_NAME: &str = "config.json";

/// A configuration takes some kilobytes; one with many labels some megabytes.
const MAX_BYTES: u64 = 64 << 20;

/// More of anything than the largest encoders have by far, and few enough that no product of two overflows.
const MAX_SIZE: usize = 1 << 28;

/// Tables of angles have a row for each position, whatever the weights say.
const MAX_POSITIONS: usize = 1 << 20;
/// Angles of positions that are kept in memory, 4 bytes each, some of which are needed several times.
const MAX_ROTATED: usize = 1 << 27;

/// The kinds of model that are known here: `model_type`, and what the names of its classes begin with.
const FAMILIES: [(&str, &str, Family); 6] = [
    ("bert", "Bert", Family::Bert),
    ("roberta", "Roberta", Family::Roberta),
    ("xlm-roberta", "XLMRoberta", Family::Roberta),
    ("camembert", "Camembert", Family::Roberta),
    ("distilbert", "DistilBert", Family::DistilBert),
    ("modernbert", "ModernBert", Family::ModernBert),
];

const CLASSIFIER: &str = "ForSequenceClassification";

/// The classes whose hidden states are served.
const BODIES: [&str; 2] = ["Model", "ForMaskedLM"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bert,
    /// Also XLM-RoBERTa and CamemBERT, which differ in their vocabulary alone.
    Roberta,
    DistilBert,
    ModernBert,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// By the error function.
    Gelu,
    /// By the hyperbolic tangent, which older models were trained with.
    GeluTanh,
    Relu,
    Silu,
    Tanh,
}

/// Which of the last hidden states a classifier sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    First,
    /// The mean over the tokens that are not padding.
    Mean,
}

/// An encoder and what is on top of it.
#[derive(Clone, Debug)]
pub struct Architecture {
    pub family: Family,
    pub vocabulary: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub activation: Activation,
    /// Rows in the table of positions, or the longest text that angles are made for.
    pub positions: usize,
    /// Token types; 0 where there is no table of them.
    pub token_types: usize,
    pub epsilon: f64,
    /// The token whose place does not count, in models that count the others.
    pub padding: usize,
    pub classifier: Option<Classifier>,
    pub modern: Modern,
}

#[derive(Clone, Copy, Debug)]
pub struct Classifier {
    pub classes: usize,
    pub pooling: Pooling,
    pub activation: Activation,
    /// Whether the layer before the last has a bias, where models differ in that.
    pub bias: bool,
}

/// What only ModernBERT has.
#[derive(Clone, Debug, Default)]
pub struct Modern {
    /// For each layer, how far from itself a token sees; `None` for as far as the text goes.
    pub windows: Vec<Option<usize>>,
    pub global_theta: f64,
    pub local_theta: f64,
    pub attention_bias: bool,
    pub feed_forward_bias: bool,
    pub norm_bias: bool,
}

impl Architecture {
    /// Reads the `config.json` in `folder`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the key and what is expected; with the list of what is supported when the model is
    /// something else. `Internal` when the disk fails.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(FILE_NAME);
        let named = |reason: String| Error::invalid(format!("{}: {reason}", path.display()));
        let content = bounded(&path)
            .map_err(|error| Error { message: format!("{}: {}", path.display(), error.message), ..error })?;
        let value: Value = serde_json::from_slice(&content).map_err(|error| named(format!("not JSON: {error}")))?;
        let Value::Object(keys) = value else { return Err(named("must be a JSON object".to_owned())) };
        Self::parse(&Keys(keys)).map_err(named)
    }

    fn parse(keys: &Keys) -> Result<Self, String> {
        let (family, is_classifier) = kind(keys)?;
        refuse_others(keys)?;
        let [hidden, layers, heads, intermediate] = match family {
            Family::DistilBert => ["dim", "n_layers", "n_heads", "hidden_dim"],
            _ => ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"],
        };
        let hidden_key = hidden;
        let heads_key = heads;
        let (hidden, heads) = (keys.size(hidden)?, keys.size(heads)?);
        if hidden % heads != 0 {
            return Err(format!("{hidden_key} {hidden} is not a multiple of {heads_key} {heads}"));
        }
        let layers = keys.size(layers)?;
        let activation = match family {
            Family::DistilBert => "activation",
            Family::ModernBert => "hidden_activation",
            Family::Bert | Family::Roberta => "hidden_act",
        };
        let epsilon = match family {
            Family::DistilBert => 1e-12,
            Family::ModernBert => keys.number("norm_eps")?.unwrap_or(1e-5),
            Family::Bert | Family::Roberta => keys.number("layer_norm_eps")?.unwrap_or(1e-12),
        };
        if !(epsilon > 0.0 && epsilon < 1.0) {
            return Err(format!("the epsilon of normalization must be above 0 and below 1, is {epsilon}"));
        }
        let token_types = match family {
            Family::Bert | Family::Roberta => keys.count("type_vocab_size")?.unwrap_or(2),
            Family::DistilBert | Family::ModernBert => 0,
        };
        let vocabulary = keys.size("vocab_size")?;
        let positions = keys.size("max_position_embeddings")?;
        let padding = match family {
            Family::Roberta => keys.count("pad_token_id")?.unwrap_or(1),
            _ => 0,
        };
        if family == Family::Roberta && positions <= padding + 1 {
            return Err(format!(
                "max_position_embeddings must be above pad_token_id + 1, which is {}, is {positions}",
                padding + 1
            ));
        }
        let classifier = if is_classifier { Some(classifier(keys, family)?) } else { None };
        let modern = if family == Family::ModernBert {
            if (hidden / heads) % 2 != 0 {
                return Err(format!("{hidden_key} ÷ {heads_key} must be even, is {}", hidden / heads));
            }
            if positions > MAX_POSITIONS {
                return Err(format!("max_position_embeddings must be at most {MAX_POSITIONS}, is {positions}"));
            }
            let rotated = positions.saturating_mul(hidden / heads);
            if rotated > MAX_ROTATED {
                return Err(format!(
                    "max_position_embeddings × {hidden_key} ÷ {heads_key} must be at most {MAX_ROTATED}, is {rotated}"
                ));
            }
            modern(keys, layers)?
        } else {
            Modern::default()
        };
        Ok(Self {
            family,
            vocabulary,
            hidden,
            layers,
            heads,
            intermediate: keys.size(intermediate)?,
            activation: keys.activation(activation)?,
            positions,
            token_types,
            epsilon,
            padding,
            classifier,
            modern,
        })
    }

    /// The most tokens that one text may have.
    pub fn limit(&self) -> usize {
        match self.family {
            // The table's first rows are of tokens that do not count.
            Family::Roberta => self.positions - self.padding - 1,
            _ => self.positions,
        }
    }

    pub fn head_size(&self) -> usize {
        self.hidden / self.heads
    }

    /// Whether requests may say of which type their tokens are.
    pub fn takes_token_types(&self) -> bool {
        self.family == Family::Bert && self.token_types > 0
    }
}

/// What is supported, for messages.
fn supported() -> String {
    let types: Vec<_> = FAMILIES.iter().map(|(name, ..)| *name).collect();
    let classes: Vec<_> = FAMILIES.iter().map(|(_, name, _)| *name).collect();
    format!(
        "supported are the model types {}, and of each the architectures …{}, …{} and …{CLASSIFIER}, where … is {}",
        types.join(", "),
        BODIES[0],
        BODIES[1],
        classes.join(", "),
    )
}

/// The family, and whether a classifier is on top.
fn kind(keys: &Keys) -> Result<(Family, bool), String> {
    let Some(model_type) = keys.text("model_type")? else {
        return Err(format!("model_type is missing; {}", supported()));
    };
    let known = FAMILIES.iter().find(|(name, ..)| *name == model_type);
    let Some((_, class, family)) = known else {
        return Err(format!("model_type '{}' is not supported; {}", shorten(model_type), supported()));
    };
    let architectures = match keys.get("architectures") {
        None => return Ok((*family, false)),
        Some(Value::Array(names)) => names,
        Some(_) => return Err("architectures must be a list of names".to_owned()),
    };
    let Some(first) = architectures.first() else { return Ok((*family, false)) };
    let first = first.as_str().ok_or("architectures must be a list of names")?;
    match first.strip_prefix(class) {
        Some(CLASSIFIER) => Ok((*family, true)),
        Some(rest) if BODIES.contains(&rest) => Ok((*family, false)),
        _ => Err(format!(
            "architecture '{}' of model_type '{model_type}' is not supported; {}",
            shorten(first),
            supported()
        )),
    }
}

/// Refuses variants that would run and give other numbers.
fn refuse_others(keys: &Keys) -> Result<(), String> {
    match keys.text("position_embedding_type")? {
        None | Some("absolute") => {}
        // ModernBERT's turn with the position, whatever an exporter writes here.
        Some(_) if keys.text("model_type")? == Some("modernbert") => {}
        Some(other) => {
            return Err(format!("position_embedding_type must be 'absolute', is '{}'", shorten(other)));
        }
    }
    for key in ["is_decoder", "add_cross_attention"] {
        if keys.flag(key)? == Some(true) {
            return Err(format!("{key} must be false: only encoders are supported"));
        }
    }
    if keys.get("quantization_config").is_some() {
        return Err("quantization_config is there, and only weights that are not quantized are supported".to_owned());
    }
    Ok(())
}

fn classifier(keys: &Keys, family: Family) -> Result<Classifier, String> {
    let labels = match keys.get("id2label") {
        None => keys.count("num_labels")?.unwrap_or(2),
        Some(Value::Object(labels)) => labels.len(),
        Some(_) => return Err("id2label must be a JSON object".to_owned()),
    };
    if labels == 0 {
        return Err("id2label must name at least one class".to_owned());
    }
    let pooling = match keys.text("classifier_pooling")? {
        _ if family != Family::ModernBert => Pooling::First,
        None | Some("cls") => Pooling::First,
        Some("mean") => Pooling::Mean,
        Some(other) => {
            return Err(format!("classifier_pooling must be 'cls' or 'mean', is '{}'", shorten(other)));
        }
    };
    let activation = match family {
        Family::Bert | Family::Roberta => Activation::Tanh,
        Family::DistilBert => Activation::Relu,
        Family::ModernBert => keys.activation("classifier_activation")?,
    };
    let bias = family != Family::ModernBert || keys.flag("classifier_bias")?.unwrap_or(false);
    Ok(Classifier { classes: labels, pooling, activation, bias })
}

fn modern(keys: &Keys, layers: usize) -> Result<Modern, String> {
    let half = keys.count("local_attention")?.unwrap_or(128) / 2;
    let windows = match keys.get("layer_types") {
        None => {
            let every = keys.count("global_attn_every_n_layers")?.unwrap_or(3);
            if every == 0 {
                return Err("global_attn_every_n_layers must be at least 1, is 0".to_owned());
            }
            if layers > MAX_SIZE >> 10 {
                return Err(format!("num_hidden_layers must be at most {}, is {layers}", MAX_SIZE >> 10));
            }
            (0..layers).map(|layer| (layer % every != 0).then_some(half)).collect()
        }
        Some(Value::Array(kinds)) if kinds.len() == layers => kinds
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(half)),
                _ => Err("layer_types must be 'full_attention' or 'sliding_attention'".to_owned()),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(format!("layer_types must be a list of {layers}, as num_hidden_layers says")),
    };
    let global_theta = theta(keys, "full_attention", "global_rope_theta")?.unwrap_or(160_000.0);
    let local_theta = theta(keys, "sliding_attention", "local_rope_theta")?;
    // Left out it is 10,000, and written as null it is as the other.
    let default = if keys.0.get("local_rope_theta").is_some_and(Value::is_null) { global_theta } else { 10_000.0 };
    Ok(Modern {
        windows,
        global_theta,
        local_theta: local_theta.unwrap_or(default),
        attention_bias: keys.flag("attention_bias")?.unwrap_or(false),
        feed_forward_bias: keys.flag("mlp_bias")?.unwrap_or(false),
        norm_bias: keys.flag("norm_bias")?.unwrap_or(false),
    })
}

/// The base of the angles: newer configurations have one for each kind of attention, under `rope_parameters`.
fn theta(keys: &Keys, kind: &str, key: &str) -> Result<Option<f64>, String> {
    let value = match keys.get("rope_parameters").and_then(|kinds| kinds.get(kind)) {
        None => keys.number(key)?,
        Some(parameters) => {
            match parameters.get("rope_type").and_then(Value::as_str) {
                None | Some("default") => {}
                Some(other) => {
                    return Err(format!("rope_parameters: rope_type must be 'default', is '{}'", shorten(other)));
                }
            }
            parameters.get("rope_theta").and_then(Value::as_f64)
        }
    };
    match value {
        Some(value) if !(value.is_finite() && value > 0.0) => Err(format!("{key} must be above 0, is {value}")),
        value => Ok(value),
    }
}

/// The content of a file of ordinary size.
pub fn bounded(path: &Path) -> Result<Vec<u8>, Error> {
    let unread = |error: std::io::Error| Error::unread(&error, error.to_string());
    let metadata = std::fs::metadata(path).map_err(unread)?;
    if !metadata.is_file() {
        // A device has no length, and a pipe no end.
        return Err(Error::invalid("not a file"));
    }
    let length = metadata.len();
    if length > MAX_BYTES {
        return Err(Error::invalid(format!("has {length} bytes; at most {MAX_BYTES} are expected")));
    }
    let mut content = Vec::new();
    let file = std::fs::File::open(path).map_err(unread)?;
    file.take(MAX_BYTES).read_to_end(&mut content).map_err(unread)?;
    Ok(content)
}

/// The keys of a configuration; null counts as left out.
struct Keys(Map<String, Value>);

impl Keys {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<&str>, String> {
        let value = self.get(key);
        value.map(|value| value.as_str().ok_or_else(|| format!("{key} must be a string"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        let value = self.get(key);
        value.map(|value| value.as_bool().ok_or_else(|| format!("{key} must be true or false"))).transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let value = self.get(key);
        value.map(|value| value.as_f64().ok_or_else(|| format!("{key} must be a number"))).transpose()
    }

    fn count(&self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        match count.filter(|&count| count <= MAX_SIZE) {
            Some(count) => Ok(Some(count)),
            None => {
                let shown = shorten(&value.to_string());
                Err(format!("{key} must be a whole number of at most {MAX_SIZE}, is {shown}"))
            }
        }
    }

    /// A number of things that there must be some of.
    fn size(&self, key: &str) -> Result<usize, String> {
        match self.count(key)? {
            None => Err(format!("{key} is missing")),
            Some(0) => Err(format!("{key} must be at least 1, is 0")),
            Some(size) => Ok(size),
        }
    }

    fn activation(&self, key: &str) -> Result<Activation, String> {
        Ok(match self.text(key)? {
            None | Some("gelu") => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            Some("silu" | "swish") => Activation::Silu,
            Some("tanh") => Activation::Tanh,
            Some(other) => {
                let known = "gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu, silu, swish and tanh";
                return Err(format!("{key} '{}' is not supported; there are {known}", shorten(other)));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Code;

    fn parse(value: Value) -> Result<Architecture, String> {
        let Value::Object(keys) = value else { panic!("not an object") };
        Architecture::parse(&Keys(keys))
    }

    fn bert(changes: Value) -> Value {
        let mut config = json!({
            "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 384,
            "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "hidden_act": "gelu",
            "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    #[test]
    fn models_are_told_apart() {
        let read = |model_type: &str, class: &str| {
            parse(bert(json!({"model_type": model_type, "architectures": [class], "pad_token_id": 1})))
        };
        assert!(parse(bert(json!({}))).unwrap().classifier.is_none());
        assert!(parse(bert(json!({"architectures": null}))).unwrap().classifier.is_none());
        assert!(read("bert", "BertForMaskedLM").unwrap().classifier.is_none());
        assert_eq!(read("bert", "BertForSequenceClassification").unwrap().classifier.unwrap().classes, 2);
        for (model_type, class) in [("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert")] {
            let body = read(model_type, &format!("{class}Model")).unwrap();
            assert_eq!((body.family, body.limit(), body.takes_token_types()), (Family::Roberta, 510, false));
        }
        for (model_type, class, what) in [
            ("bert", "RobertaModel", "architecture 'RobertaModel' of model_type 'bert' is not supported"),
            ("bert", "BertForTokenClassification", "architecture 'BertForTokenClassification'"),
            ("gpt2", "GPT2Model", "model_type 'gpt2' is not supported"),
        ] {
            let message = read(model_type, class).unwrap_err();
            assert!(message.starts_with(what), "{message}");
            assert!(
                message.contains("supported are the model types bert, roberta, xlm-roberta, camembert, distilbert")
            );
        }
        assert!(parse(json!({})).unwrap_err().starts_with("model_type is missing; supported are"));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let message = |changes| parse(bert(changes)).unwrap_err();
        assert_eq!(message(json!({"hidden_size": null})), "hidden_size is missing");
        assert_eq!(message(json!({"vocab_size": 0})), "vocab_size must be at least 1, is 0");
        assert_eq!(message(json!({"vocab_size": -1})), "vocab_size must be a whole number of at most 268435456, is -1");
        assert!(message(json!({"vocab_size": u64::MAX})).contains("at most 268435456"));
        assert_eq!(message(json!({"hidden_size": 385})), "hidden_size 385 is not a multiple of num_attention_heads 12");
        assert!(message(json!({"hidden_act": "quick_gelu"})).starts_with("hidden_act 'quick_gelu' is not supported"));
        assert!(message(json!({"position_embedding_type": "relative_key"})).contains("must be 'absolute'"));
        assert!(message(json!({"is_decoder": true})).starts_with("is_decoder must be false"));
        assert!(message(json!({"layer_norm_eps": 0.0})).contains("epsilon"));
        assert!(
            message(json!({"model_type": "roberta", "architectures": null, "pad_token_id": 511}))
                .starts_with("max_position_embeddings must be above pad_token_id + 1, which is 512")
        );
    }

    #[test]
    fn tables_of_angles_have_a_bound() {
        let message = |changes: Value| {
            let mut config = bert(json!({"model_type": "modernbert", "architectures": null}));
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            parse(config).map(|_| ()).unwrap_err()
        };
        assert_eq!(
            message(json!({"max_position_embeddings": 1 << 28})),
            "max_position_embeddings must be at most 1048576, is 268435456"
        );
        assert_eq!(
            message(json!({"max_position_embeddings": 1 << 20, "hidden_size": 1 << 28, "num_attention_heads": 1})),
            "max_position_embeddings × hidden_size ÷ num_attention_heads must be at most 134217728, is 281474976710656"
        );
        assert_eq!(
            message(json!({"num_hidden_layers": 1 << 28})),
            "num_hidden_layers must be at most 262144, is 268435456"
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_cannot_be_read_is_told_from_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        for (target, code, expected) in [
            ("/dev/zero", Code::InvalidArgument, "not a file"),
            ("/nowhere", Code::InvalidArgument, "(os error 2)"),
            // Reading the memory at address 0 fails as a disk does.
            ("/proc/self/mem", Code::Internal, "(os error 5)"),
        ] {
            std::os::unix::fs::symlink(target, &path).unwrap();
            let error = Architecture::read(folder.path()).unwrap_err();
            assert!(
                error.message.starts_with(&path.display().to_string()) && error.message.ends_with(expected),
                "{error}"
            );
            assert_eq!(error.code, code, "{error}");
            std::fs::remove_file(&path).unwrap();
        }
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(Architecture::read(folder.path()).unwrap_err().message.ends_with("not a file"));
    }

    #[test]
    fn modern_layers_see_as_far_as_they_say() {
        let config = |changes: Value| {
            let mut config = bert(json!({"model_type": "modernbert", "architectures": null, "local_attention": 8}));
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            parse(config).unwrap().modern
        };
        let older = config(json!({"global_attn_every_n_layers": 3, "global_rope_theta": 5.0, "local_rope_theta": 2.0}));
        assert_eq!(older.windows, [None, Some(4), Some(4), None, Some(4), Some(4)]);
        assert_eq!((older.global_theta, older.local_theta), (5.0, 2.0));
        let newer = config(json!({
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
                            "full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {"rope_theta": 5.0, "rope_type": "default"},
                                "sliding_attention": {"rope_theta": 2.0, "rope_type": "default"}},
        }));
        assert_eq!(newer.windows, older.windows);
        assert_eq!((newer.global_theta, newer.local_theta), (5.0, 2.0));
        assert_eq!(config(json!({"local_rope_theta": null, "global_rope_theta": 7.0})).local_theta, 7.0);
    }
}
