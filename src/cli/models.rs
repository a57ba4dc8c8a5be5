//! `tidegate models`: what a running server serves, and where it is from.

use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::Value;

use super::{
    ask::{AskArgs, Ops},
    print::{say, say_json},
    rollout::{advised, why},
};
use crate::{
    api::admin::{
        documents::{ModelStatus, SourceStatus, VersionDetails},
        requests::{AliasRequest, Why},
    },
    id::{Alias, ModelName, Version},
    model::State,
    source::{
        Lineage,
        card::{Basis, Card},
    },
};

#[derive(Args)]
pub struct ModelsArgs {
    #[command(flatten)]
    ask: AskArgs,
    #[command(subcommand)]
    action: Option<ModelsAction>,
}

#[derive(Subcommand)]
enum ModelsAction {
    /// Show one version: its files and their digests, where they are from, and how they were made.
    Show {
        model: String,
        /// Default: the version that answers requests that name none
        version: Option<String>,
    },
    /// Call a version by a name. The one that the model follows (champion unless its settings say otherwise) has its
    /// version serve, which takes over as any new version does; the others load theirs, for requests that name them.
    Alias {
        #[arg(value_parser = ModelName::parse)]
        model: ModelName,
        /// champion or challenger, for instance
        #[arg(value_parser = Alias::parse)]
        name: Alias,
        /// The version that it stands for
        #[arg(required_unless_present = "remove", value_parser = Version::parse)]
        version: Option<Version>,
        /// Have it stand for none any more
        #[arg(long, conflicts_with = "version")]
        remove: bool,
        /// Why, for the audit log
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
}

pub fn models(args: &ModelsArgs) -> anyhow::Result<ExitCode> {
    let (ops, json) = (Ops::with_token(&args.ask)?, args.ask.json);
    match &args.action {
        Some(ModelsAction::Show { model, version }) => return show(&ops, model, version.as_deref(), json),
        Some(ModelsAction::Alias { model, name, version, reason, .. }) => {
            return alias(&ops, model, name, version.as_ref(), why(reason.clone()), json);
        }
        None => {}
    }
    let answer = ops.get("/admin/v1/models")?;
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let models: Vec<ModelStatus> = answer.read()?;
    say(format_args!("{:<24} {:<10} {:<10} REASON", "MODEL", "VERSION", "STATE"))?;
    for model in models {
        for version in &model.versions {
            let default = model.default_version.as_deref() == Some(version.version.as_str());
            let shown = if default { format!("{}*", version.version) } else { version.version.clone() };
            let aliases =
                model.aliases.iter().filter(|(_, to)| **to == version.version).map(|(alias, _)| alias.as_str());
            let said: Vec<&str> = aliases.chain([version.reason.as_str()]).filter(|text| !text.is_empty()).collect();
            say(format_args!("{:<24} {shown:<10} {:<10} {}", model.name, version.state, said.join("; ")))?;
        }
        if let Some(problem) = model.problem {
            say(format_args!("{:<24} {:<10} {:<10} {problem}", model.name, "-", State::Failed.as_str()))?;
        }
    }
    let sources: Vec<SourceStatus> = ops.get("/admin/v1/sources")?.read()?;
    sources.iter().try_for_each(source)?;
    Ok(ExitCode::SUCCESS)
}

fn alias(
    ops: &Ops,
    model: &ModelName,
    name: &Alias,
    to: Option<&Version>,
    why: Why,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let path = format!("/admin/v1/models/{model}/aliases/{name}");
    let answer = match to {
        Some(version) => ops.change(Method::PUT, &path, None, &AliasRequest { version: version.to_string(), why }),
        None => ops.change(Method::DELETE, &path, None, &why),
    };
    let answer = answer.map_err(|error| advised(error, model))?;
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let status: ModelStatus = answer.read()?;
    match status.aliases.get(name.as_str()) {
        Some(version) => say(format_args!("{model}: {name} is version {version}"))?,
        None => say(format_args!("{model}: {name} is no version"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// How a place stands that models are mirrored from.
fn source(source: &SourceStatus) -> anyhow::Result<()> {
    let uri = &source.uri;
    say(format_args!(""))?;
    match (&source.away_since, &source.error, &source.answered) {
        _ if source.given_up.is_some() => {
            say(format_args!("{uri} is followed no longer: {}", source.given_up.as_deref().unwrap_or_default()))?;
        }
        (Some(since), Some(error), _) => say(format_args!("{uri} is out of reach since {since}: {error}"))?,
        (_, _, Some(answered)) => say(format_args!("{uri} answered {answered}"))?,
        _ => say(format_args!("{uri} was not looked at yet"))?,
    }
    let named = |model: &str, version: &Option<String>| match version {
        Some(version) => format!("version {version} of {model}"),
        None => format!("settings of {model}"),
    };
    for one in &source.fetching {
        let (what, fetched, total) = (named(&one.model, &one.version), one.fetched_bytes, one.total_bytes);
        say(format_args!("  {what}: {fetched} of {total} bytes fetched since {}", one.since))?;
    }
    for one in &source.problems {
        let what = named(&one.model, &one.version);
        say(format_args!("  {what} is not mirrored since {}: {}", one.since, one.error))?;
    }
    if let Some(written) = &source.write_back {
        if let (Some(error), Some(since)) = (&written.error, &written.since) {
            say(format_args!("  not written back since {since}: {error}"))?;
        }
        if let Some(alias) = &written.alias {
            say(format_args!("  {alias}"))?;
        }
    }
    Ok(())
}

fn show(ops: &Ops, model: &str, version: Option<&str>, json: bool) -> anyhow::Result<ExitCode> {
    let path = format!("/admin/v1/models/{}", part(model));
    let version = match version {
        Some(version) => version.to_owned(),
        None => match ops.get(&path)?.read::<ModelStatus>()?.default_version {
            Some(version) => version,
            None => bail!("model '{model}' has no version that serves; name one"),
        },
    };
    let answer = ops.get_slowly(&format!("{path}/versions/{}", part(&version)))?;
    if json {
        say_json(&answer.read::<serde_json::Value>()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    details(&answer.read()?)?;
    Ok(ExitCode::SUCCESS)
}

fn details(version: &VersionDetails) -> anyhow::Result<()> {
    let line = |name: &str, text: &str| say(format_args!("{name:<12} {text}"));
    let some = |name: &str, text: &Option<String>| text.as_ref().map_or(Ok(()), |text| line(name, text));
    line("model", &version.model)?;
    line("version", &version.version)?;
    let reason = if version.reason.is_empty() { String::new() } else { format!(": {}", version.reason) };
    line("state", &format!("{}{reason}", version.state))?;
    some("digest", &version.digest)?;
    if let Some(signed) = &version.signed {
        let by = signed.method.as_ref().map_or(String::new(), |method| {
            let signer = signed.key.as_ref().or(signed.identity.as_ref());
            format!(" by {method} {}", signer.map_or("", String::as_str))
        });
        let reason = signed.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
        line("signed", &format!("{}{by}{reason}", signed.state))?;
    }
    some("source", &version.source)?;
    some("revision", &version.revision)?;
    if let Some(lineage) = &version.lineage {
        some("registered", &lineage.version)?;
        some("stage", &lineage.stage)?;
        if !lineage.aliases.is_empty() {
            line("aliases", &lineage.aliases.join(", "))?;
        }
        some("description", &lineage.description)?;
        some("author", &lineage.author)?;
        some("run", &lineage.run_id)?;
        some("git commit", &lineage.git_commit)?;
        for (name, value) in &lineage.parameters {
            line("parameter", &format!("{name} = {value}"))?;
        }
        for (name, value) in &lineage.metrics {
            let value = value.map_or("not a finite number".to_owned(), |value| value.to_string());
            line("metric", &format!("{name} = {value}"))?;
        }
        for dataset in &lineage.datasets {
            let digest = dataset.digest.as_ref().map_or(String::new(), |digest| format!(" ({digest})"));
            let context = dataset.context.as_ref().map_or(String::new(), |context| format!(" for {context}"));
            line("dataset", &format!("{}{digest}{context}", dataset.name))?;
        }
        for (name, value) in &lineage.tags {
            line("tag", &format!("{name} = {value}"))?;
        }
    }
    if let Some(signature) = &version.signature {
        for (name, fields) in
            [("input", &signature.inputs), ("output", &signature.outputs), ("param", &signature.params)]
        {
            fields.iter().flatten().try_for_each(|field| line(name, &described(field)))?;
        }
    }
    if let Some(shown) = &version.card {
        card(shown, version.lineage.as_ref())?;
    }
    version.card_notes.iter().try_for_each(|note| line("note", note))?;
    for file in &version.files {
        line("file", &format!("{} {} bytes, sha256 {}", file.path, file.bytes, file.sha256))?;
    }
    Ok(())
}

/// A field of MLflow's signature.
fn described(field: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let name = field.get("name").map_or("(unnamed)".to_owned(), text);
    match field.get("tensor-spec") {
        Some(spec) => {
            let [dtype, shape] = ["dtype", "shape"].map(|key| spec.get(key).map_or(String::new(), text));
            format!("{name} {dtype} {shape}")
        }
        None => {
            let default = field.get("default").map_or(String::new(), |default| format!(" = {default}"));
            format!("{name} {}{default}", field.get("type").map_or(String::new(), text))
        }
    }
}

/// What the card says; that of a run says nothing that its lineage has not.
fn card(card: &Card, lineage: Option<&Lineage>) -> anyhow::Result<()> {
    let line = |name: &str, text: &str| say(format_args!("{name:<12} {text}"));
    let some = |name: &str, text: &Option<String>| text.as_ref().map_or(Ok(()), |text| line(name, text));
    let list = |name: &str, texts: &[String]| match texts {
        [] => Ok(()),
        texts => line(name, &texts.join(", ")),
    };
    line("card", card.file.as_deref().unwrap_or("made from the run"))?;
    if card.from == Basis::Run && lineage.is_some() {
        return Ok(());
    }
    some("  name", &card.name)?;
    some("  version", &card.version)?;
    some("  about", &card.description)?;
    list("  author", &card.authors)?;
    list("  license", &card.licenses)?;
    list("  language", &card.languages)?;
    some("  library", &card.library)?;
    some("  task", &card.task)?;
    some("  kind", &card.architecture)?;
    list("  made from", &card.base_models)?;
    for dataset in &card.datasets {
        line("  dataset", &dataset.name)?;
    }
    for result in &card.results {
        let about = [&result.dataset, &result.slice].into_iter().flatten().cloned().collect::<Vec<_>>().join(", ");
        let about = if about.is_empty() { about } else { format!(" ({about})") };
        let value = result.value.as_str().map_or_else(|| result.value.to_string(), ToOwned::to_owned);
        line("  result", &format!("{} = {value}{about}", result.metric))?;
    }
    list("  tags", &card.tags)?;
    list("  for", &card.users)?;
    list("  use", &card.use_cases)?;
    list("  limits", &card.limitations)
}

/// A name as a part of a path.
fn part(name: &str) -> String {
    percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string()
}
