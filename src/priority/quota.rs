//! The share of the machine that the control group of the process may use, where it has a quota.

use std::path::Path;

/// Processors that the process may keep busy, by the smallest quota of its control group and those above it; `None`
/// without a quota, and where there is only the first version of control groups.
pub fn of_this_process() -> Option<f64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    smallest(Path::new("/sys/fs/cgroup"), path(&groups)?)
}

/// The group of the second version's only tree, without the slash before it: as seen from a container, often the root.
fn path(groups: &str) -> Option<&Path> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(Path::new(path.trim_start_matches('/')))
}

/// The smallest quota of the groups on the way from `root` to `path`.
fn smallest(root: &Path, path: &Path) -> Option<f64> {
    let quota = |group: &Path| parse(&std::fs::read_to_string(root.join(group).join("cpu.max")).ok()?);
    path.ancestors().filter_map(quota).min_by(f64::total_cmp)
}

/// What a file `cpu.max` says: a time and the period it is for, both in µs, or `max` in place of the time.
fn parse(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_so_many_processors() {
        for (text, quota) in [
            ("150000 100000\n", Some(1.5)),
            ("5000 10000", Some(0.5)),
            ("max 100000\n", None),
            ("0 100000", None),
            ("100000 0", None),
            ("100000", None),
            ("", None),
        ] {
            assert_eq!(parse(text), quota, "{text:?}");
        }
    }

    #[test]
    fn the_smallest_quota_on_the_way_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("pods/one");
        std::fs::create_dir_all(&group).unwrap();
        let of = |groups: &str| smallest(root.path(), path(groups)?);
        let inside = "12:cpu:/other\n0::/pods/one\n";
        assert_eq!(of(inside), None);
        for (folder, text, quota) in [
            (&group, "max 100000\n", None),
            (&root.path().join("pods"), "250000 100000\n", Some(2.5)),
            (&group, "300000 100000\n", Some(2.5)),
            (&group, "200000 100000\n", Some(2.0)),
            (&root.path().to_owned(), "50000 100000\n", Some(0.5)),
        ] {
            std::fs::write(folder.join("cpu.max"), text).unwrap();
            assert_eq!(of(inside), quota);
        }
        assert_eq!(of("0::/"), Some(0.5), "in a namespace of its own");
        assert_eq!(of("4:cpu:/pods/one\n"), None, "the first version has no such files");
    }
}
