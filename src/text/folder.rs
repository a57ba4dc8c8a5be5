//! What the files of a model in Hugging Face's layout say of its texts and its answers.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{Pooling, wrong};
use crate::error::Error;

pub(super) const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const MODULES: &str = "modules.json";
const PROMPTS: &str = "config_sentence_transformers.json";
/// The settings of the transformer of a sentence-transformers model, under the names that they have had.
const TRANSFORMER_CONFIGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// Models that count positions from behind that of padding, as RoBERTa does.
const OFFSET_POSITIONS: [&str; 11] = [
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "luke",
];

/// Bytes of settings, which are read whole; and of a tokenizer, whose vocabulary may be large.
const MOST_SETTINGS: u64 = 4 << 20;
const MOST_TOKENIZER: u64 = 256 << 20;
/// Tokenizers that know of no limit say some huge number.
const LARGEST_LIMIT: f64 = 1e9;

/// The files, read.
#[derive(Debug, Default)]
pub(super) struct Folder {
    pub config: Config,
    /// Tokens that a text is cut to, special ones included.
    pub max_length: Option<usize>,
    /// Tokens that the model can be given at all.
    pub most: Option<usize>,
    pub lower_case: bool,
    /// The end of a text that is cut off, where a file says so.
    pub truncation_side: Option<String>,
    pub prompt: Option<String>,
    /// All prompts, by name.
    pub prompts: BTreeMap<String, String>,
    /// Whether the prompt's tokens count where all of a text's do.
    pub includes_prompt: bool,
    /// What a cross-encoder makes of its logit, by the newest of the files that may say so.
    pub activation: Option<String>,
}

/// The modules of a sentence-transformers model, behind the transformer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Modules {
    pub pooling: Option<Pooling>,
    pub normalize: bool,
}

/// What there is of interest in config.json.
///
/// Numbers may be -1 for none.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    pub model_type: Option<String>,
    pub hidden_size: Option<i64>,
    /// DistilBERT's name for it.
    pub dim: Option<i64>,
    pub vocab_size: Option<i64>,
    pub pad_token_id: Option<i64>,
    pub max_position_embeddings: Option<i64>,
    pub problem_type: Option<String>,
    pub id2label: Option<BTreeMap<String, String>>,
    pub num_labels: Option<usize>,
    pub sentence_transformers: Option<CrossEncoder>,
    pub sbert_ce_default_activation_function: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CrossEncoder {
    pub activation_fn: Option<String>,
}

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    r#type: String,
}

impl Module {
    /// The name of its class; the package that it is in has changed over time.
    fn class(&self) -> &str {
        self.r#type.rsplit('.').next().unwrap_or_default()
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TransformerConfig {
    max_seq_length: Option<i64>,
    do_lower_case: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    model_max_length: Option<f64>,
    truncation_side: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Prompts {
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
    activation_fn: Option<String>,
}

/// Both ways in which a pooling says what it does.
#[derive(Default, Deserialize)]
#[serde(default)]
struct PoolingConfig {
    include_prompt: Option<bool>,
    pooling_mode: Option<Modes>,
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_lasttoken: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Modes {
    One(String),
    Several(Vec<String>),
}

/// The bytes of the tokenizer; `None` when there is none.
///
/// # Errors
/// When it is there and cannot be read.
pub(super) fn tokenizer(files: &Path) -> Result<Option<(PathBuf, Vec<u8>)>, Error> {
    let path = files.join(TOKENIZER);
    Ok(read(&path, MOST_TOKENIZER)?.map(|bytes| (path, bytes)))
}

impl Folder {
    /// # Errors
    /// `InvalidArgument` naming the file and what is wrong with it.
    pub fn read(files: &Path) -> Result<Self, Error> {
        let config: Config = parse(&files.join(CONFIG))?.unwrap_or_default();
        let transformer = TRANSFORMER_CONFIGS.iter().find_map(|name| parse(&files.join(name)).transpose());
        let transformer: TransformerConfig = transformer.transpose()?.unwrap_or_default();
        let tokenizer: TokenizerConfig = parse(&files.join(TOKENIZER_CONFIG))?.unwrap_or_default();
        let prompts: Prompts = parse(&files.join(PROMPTS))?.unwrap_or_default();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 1e9")]
        let of_tokenizer =
            tokenizer.model_max_length.filter(|limit| (1.0..LARGEST_LIMIT).contains(limit)).map(|limit| limit as usize);
        // The smallest counts; sentence-transformers' own stands above the tokenizer's.
        let of_transformer = transformer.max_seq_length.and_then(positive);
        let limits = [of_transformer.or(of_tokenizer), config.positions()];
        let prompt = prompts.default_prompt_name.as_ref().and_then(|name| prompts.prompts.get(name)).cloned();
        Ok(Self {
            max_length: limits.into_iter().flatten().min(),
            most: config.positions(),
            lower_case: transformer.do_lower_case,
            prompt: prompt.filter(|prompt| !prompt.is_empty()),
            prompts: prompts.prompts,
            truncation_side: tokenizer.truncation_side,
            includes_prompt: includes_prompt(files)?,
            activation: prompts.activation_fn.or_else(|| config.activation()),
            config,
        })
    }
}

impl Config {
    /// The tokens that there are positions for.
    fn positions(&self) -> Option<usize> {
        let positions = self.max_position_embeddings.and_then(positive)?;
        let is_offset = self.model_type.as_deref().is_some_and(|kind| OFFSET_POSITIONS.contains(&kind));
        let padding = self.pad_token_id.and_then(|id| usize::try_from(id).ok()).unwrap_or(1);
        Some(positions.saturating_sub(if is_offset { padding + 1 } else { 0 }))
    }

    /// The number of ids that the model knows.
    pub fn vocabulary(&self) -> Option<u32> {
        u32::try_from(self.vocab_size?).ok().filter(|size| *size > 0)
    }

    fn activation(&self) -> Option<String> {
        let named = self.sentence_transformers.as_ref().and_then(|settings| settings.activation_fn.as_ref());
        named.or(self.sbert_ce_default_activation_function.as_ref()).cloned()
    }

    /// The names of classes, in the order of the outputs; `None` where nothing says how many there are.
    ///
    /// # Errors
    /// `InvalidArgument` when they are not numbered from 0.
    pub fn labels(&self, files: &Path) -> Result<Option<Vec<String>>, Error> {
        let Some(names) = self.id2label.as_ref().filter(|names| !names.is_empty()) else {
            return Ok(self.num_labels.map(|count| (0..count).map(|class| format!("LABEL_{class}")).collect()));
        };
        let at = |class: usize| {
            let name = names.get(&class.to_string());
            name.cloned().ok_or_else(|| {
                let count = names.len();
                wrong(&files.join(CONFIG), format!("id2label names {count} classes, and none is number {class}"))
            })
        };
        (0..names.len()).map(at).collect::<Result<_, Error>>().map(Some)
    }
}

/// Whether a prompt counts where all tokens of a text do, as far as that can be found.
fn includes_prompt(files: &Path) -> Result<bool, Error> {
    let path = files.join(MODULES);
    let listed = parse::<Vec<Module>>(&path)?.unwrap_or_default();
    let Some(module) = listed.iter().find(|module| module.class() == "Pooling") else { return Ok(true) };
    let path = inside(files, &path, &module.path)?.join(CONFIG);
    Ok(parse::<PoolingConfig>(&path)?.and_then(|config| config.include_prompt).unwrap_or(true))
}

/// What comes behind the transformer, by modules.json; nothing where there is none.
///
/// # Errors
/// `InvalidArgument` naming the module that is not known.
pub(super) fn modules(files: &Path) -> Result<Modules, Error> {
    let path = files.join(MODULES);
    let listed = parse::<Vec<Module>>(&path)?.unwrap_or_default();
    let mut modules = Modules::default();
    for module in &listed {
        match module.class() {
            "Transformer" => {}
            "Pooling" => modules.pooling = Some(pooling(files, &path, &module.path)?),
            "Normalize" => modules.normalize = true,
            other => {
                let reason = format!("module '{other}' is not supported; there is Transformer, Pooling and Normalize");
                return Err(wrong(&path, reason));
            }
        }
    }
    Ok(modules)
}

/// A module's own folder.
fn inside(files: &Path, modules: &Path, folder: &str) -> Result<PathBuf, Error> {
    if Path::new(folder).components().all(|part| matches!(part, std::path::Component::Normal(_))) {
        return Ok(files.join(folder));
    }
    Err(wrong(modules, format!("path '{folder}' leads out of the model's folder")))
}

fn pooling(files: &Path, modules: &Path, folder: &str) -> Result<Pooling, Error> {
    let path = inside(files, modules, folder)?.join(CONFIG);
    let config: PoolingConfig =
        parse(&path)?.ok_or_else(|| wrong(&path, "it is missing, and modules.json names it"))?;
    let mut modes: Vec<String> = match config.pooling_mode {
        Some(Modes::One(mode)) => vec![mode],
        Some(Modes::Several(modes)) => modes,
        None => Vec::new(),
    };
    let flags = [
        ("cls", config.pooling_mode_cls_token),
        ("mean", config.pooling_mode_mean_tokens),
        ("lasttoken", config.pooling_mode_lasttoken),
        ("max", config.pooling_mode_max_tokens),
        ("mean_sqrt_len_tokens", config.pooling_mode_mean_sqrt_len_tokens),
        ("weightedmean", config.pooling_mode_weightedmean_tokens),
    ];
    if modes.is_empty() {
        modes.extend(flags.into_iter().filter(|(_, is_set)| *is_set).map(|(mode, _)| mode.to_owned()));
    }
    match modes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] | ["mean"] => Ok(Pooling::Mean),
        ["cls"] => Ok(Pooling::Cls),
        ["lasttoken"] => Ok(Pooling::Last),
        ref other => {
            let other = other.join(" with ");
            Err(wrong(&path, format!("pooling '{other}' is not supported; there is mean, cls and lasttoken")))
        }
    }
}

fn positive(number: i64) -> Option<usize> {
    usize::try_from(number).ok().filter(|number| *number > 0)
}

/// The file as what it must be; `None` when there is none.
fn parse<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let Some(bytes) = read(path, MOST_SETTINGS)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| wrong(path, error))
}

fn unread(path: &Path, error: &io::Error) -> Error {
    Error::unread(error, format!("{}: {error}", path.display()))
}

fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, Error> {
    let size = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        // A device has no length, and a pipe no end.
        Ok(_) => return Err(wrong(path, "not a file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unread(path, &error)),
    };
    if size > most {
        return Err(wrong(path, format!("it has {size} bytes; at most {most} are read")));
    }
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    read.map(|_| Some(bytes)).map_err(|error| unread(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    #[cfg(target_os = "linux")]
    fn what_cannot_be_read_is_told_from_what_is_wrong() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let folder = tempfile::tempdir().unwrap();
        for name in [TOKENIZER, CONFIG] {
            let path = folder.path().join(name);
            let error = || tokenizer(folder.path()).err().or_else(|| Folder::read(folder.path()).err()).unwrap();
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
            let expected = format!("{}: not a file", path.display());
            assert_eq!((error().code, error().message), (Code::InvalidArgument, expected));
            std::fs::remove_file(&path).unwrap();
            // Reading the memory at address 0 fails as a disk does.
            std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
            let error = error();
            assert_eq!(error.code, Code::Internal, "{error}");
            assert!(error.message.starts_with(&format!("{}: ", path.display())), "{error}");
            std::fs::remove_file(&path).unwrap();
        }
        assert!(tokenizer(folder.path()).unwrap().is_none() && Folder::read(folder.path()).is_ok());
    }
}
