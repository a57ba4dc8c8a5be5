//! What a pointer and its checkout say of what is tracked: DVC's annotations, and git's commit.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use crate::source::{lineage::Lineage, yaml};

/// Bytes of one of git's own files; a list of 50,000 references has so many.
const MAX_BYTES: u64 = 8 << 20;
/// The branch that `HEAD` names where references are in a table: what is checked out stands in there.
const NO_BRANCH: &str = ".invalid";
/// Links from one reference to another.
const MAX_LINKS: usize = 5;

/// What is checked out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub commit: Option<String>,
    /// `None` when it is no branch.
    pub branch: Option<String>,
}

/// What a pointer's text says of what it tracks, in a checkout of this commit.
pub fn lineage(pointer: &str, head: Head) -> Lineage {
    // Who lists the files has read it and said what is wrong.
    let pointer = yaml::read(pointer).unwrap_or_default();
    let out = &pointer["outs"][0];
    let description = [out, &pointer].iter().find_map(|from| from["desc"].as_str()).map(ToOwned::to_owned);
    let mut tags = BTreeMap::new();
    for from in [&pointer, out] {
        let annotations = from["meta"].as_object().into_iter().flatten().map(|(key, value)| (key.as_str(), value));
        let own = ["type", "labels"].into_iter().map(|key| (key, &from[key]));
        tags.extend(annotations.chain(own).filter_map(|(key, value)| Some((key.to_owned(), text(value)?))));
    }
    Lineage {
        aliases: head.branch.into_iter().collect(),
        description,
        tags,
        git_commit: head.commit,
        ..Lineage::default()
    }
}

/// What is checked out in a folder, as git's files say it; nothing when it is no checkout of git.
pub fn head(checkout: &Path) -> Head {
    let Some(own) = folder(checkout) else { return Head::default() };
    // A worktree has its own head, and the references of the repository that it is of.
    let shared = read(&own.join("commondir")).map_or_else(|| own.clone(), |path| own.join(path.trim()));
    let Some(said) = read(&own.join("HEAD")) else { return Head::default() };
    let branch = said.trim().strip_prefix("ref: refs/heads/").filter(|branch| *branch != NO_BRANCH);
    let branch = branch.map(ToOwned::to_owned);
    Head { commit: commit(&said, &own, &shared), branch }
}

/// Git's own folder of a checkout.
fn folder(checkout: &Path) -> Option<PathBuf> {
    let git = checkout.join(".git");
    if git.is_dir() {
        return Some(git);
    }
    let path = read(&git)?;
    Some(checkout.join(path.trim().strip_prefix("gitdir: ")?))
}

/// The commit that the text of a reference leads to.
fn commit(said: &str, own: &Path, shared: &Path) -> Option<String> {
    let mut said = said.trim().to_owned();
    for _ in 0..MAX_LINKS {
        let Some(name) = said.strip_prefix("ref: ") else {
            let is_hash = matches!(said.len(), 40 | 64) && said.bytes().all(|byte| byte.is_ascii_hexdigit());
            return is_hash.then_some(said);
        };
        let is_within = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if !name.starts_with("refs/") || !is_within {
            return None;
        }
        let loose = [own, shared].iter().find_map(|folder| read(&folder.join(name)));
        said = match loose {
            Some(text) => text.trim().to_owned(),
            None => {
                let packed = read(&shared.join("packed-refs"))?;
                packed.lines().find_map(|line| line.strip_suffix(name)?.strip_suffix(' '))?.to_owned()
            }
        };
    }
    None
}

/// A text, or several in one, or JSON of what is more; `None` of nothing.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => Some(list.iter().filter_map(text).collect::<Vec<_>>().join(", ")),
        other => Some(other.to_string()),
    }
}

/// A small file; `None` when there is none.
fn read(path: &Path) -> Option<String> {
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn write(folder: &Path, path: &str, text: &str) {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_head_is_where_git_has_it() {
        let home = tempfile::tempdir().unwrap();
        let checkout = home.path();
        assert_eq!(head(checkout), Head::default());
        let on = |branch: &str| Head { commit: Some(COMMIT.to_owned()), branch: Some(branch.to_owned()) };
        write(checkout, ".git/HEAD", "ref: refs/heads/main\n");
        assert_eq!(head(checkout), Head { branch: Some("main".to_owned()), ..Head::default() });
        write(
            checkout,
            ".git/packed-refs",
            &format!("# pack-refs\n{} refs/heads/not/main\n{COMMIT} refs/heads/main\n", "f".repeat(40)),
        );
        assert_eq!(head(checkout), on("main"));
        let other = "e".repeat(40);
        write(checkout, ".git/refs/heads/main", &format!("{other}\n"));
        assert_eq!(head(checkout).commit, Some(other));
        write(checkout, ".git/HEAD", &format!("{COMMIT}\n"));
        assert_eq!(head(checkout), Head { commit: Some(COMMIT.to_owned()), branch: None });
        write(checkout, ".git/HEAD", "ref: refs/heads/.invalid\n");
        assert_eq!(head(checkout), Head::default());

        // A worktree beside it.
        write(checkout, ".git/worktrees/two/HEAD", "ref: refs/heads/two\n");
        write(checkout, ".git/worktrees/two/commondir", "../..\n");
        write(checkout, ".git/refs/heads/two", COMMIT);
        write(checkout, "two/.git", "gitdir: ../.git/worktrees/two\n");
        assert_eq!(head(&checkout.join("two")), on("two"));

        for wrong in ["ref: refs/../../secret", "ref: /etc/passwd", "nonsense", "ref: refs/heads/loop", ""] {
            write(checkout, ".git/HEAD", wrong);
            write(checkout, ".git/refs/heads/loop", "ref: refs/heads/loop");
            assert_eq!(head(checkout).commit, None, "{wrong}");
        }
    }

    #[test]
    fn what_is_tracked_may_be_annotated() {
        let pointer = "outs:\n- md5: d921513cf1669fcd2448587857dad7a9\n  path: iris.onnx\n  desc: Species\n  type: model\n  \
                       labels: [flowers, onnx]\n  meta: {team: botany, of: {a: 1}}\nmeta: {team: none, seed: 7}\n";
        let found = lineage(pointer, Head { commit: Some(COMMIT.to_owned()), branch: Some("main".to_owned()) });
        let tags: Vec<_> = found.tags.iter().map(|(key, text)| format!("{key}={text}")).collect();
        assert_eq!(tags, ["labels=flowers, onnx", "of={\"a\":1}", "seed=7", "team=botany", "type=model"]);
        assert_eq!((found.description.as_deref(), found.git_commit.as_deref()), (Some("Species"), Some(COMMIT)));
        assert_eq!(found.aliases, ["main"]);
        assert_eq!(lineage("desc: All\nouts: [{md5: 0}]", Head::default()).description.as_deref(), Some("All"));
        assert_eq!(lineage("[", Head::default()), Lineage::default());
    }
}
