//! README's tables are generated from the code; `UPDATE_README=1 cargo test documentation` writes them.

use tidegate::{
    api::status,
    config::{self, Field},
    control::spec::ModelSpec,
    error::Code,
    metrics,
};

fn keys(fields: &[Field]) -> String {
    let mut table = String::from("| key | default | meaning |\n|---|---|---|\n");
    for Field { path, doc, default } in fields {
        let default = default.as_ref().map_or("–".to_owned(), |default| format!("`{default}`"));
        table.push_str(&format!("| `{}` | {default} | {doc} |\n", path.join(".")));
    }
    table
}

fn families() -> String {
    let mut table = String::from("| metric | type | more labels | meaning |\n|---|---|---|---|\n");
    for family in &metrics::FAMILIES {
        let labels = if family.labels.is_empty() { "–" } else { family.labels };
        table.push_str(&format!("| `{}` | {} | {labels} | {} |\n", family.name, family.kind.as_str(), family.help));
    }
    table
}

fn codes() -> String {
    let mut table = String::from("| code | HTTP | gRPC |\n|---|---|---|\n");
    for code in Code::ALL {
        let grpc = format!("{:?}", status::grpc(code));
        table.push_str(&format!("| `{}` | {} | {grpc} |\n", code.as_str(), status::http(code).as_u16()));
    }
    table
}

#[test]
fn readme_tables_are_true() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let mut readme = std::fs::read_to_string(path).unwrap();
    let tables = [
        ("configuration", keys(&config::fields())),
        ("model settings", keys(&config::fields_of(&ModelSpec::default()))),
        ("metrics", families()),
        ("codes", codes()),
    ];
    let mut stale = Vec::new();
    for (name, table) in tables {
        let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
        let start = readme.find(&begin).unwrap_or_else(|| panic!("README has no {begin}")) + begin.len();
        let stop = readme.find(&end).unwrap_or_else(|| panic!("README has no {end}"));
        if readme[start..stop] != table {
            stale.push(name);
            readme.replace_range(start..stop, &table);
        }
    }
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(path, readme).unwrap();
    } else {
        assert!(stale.is_empty(), "README's tables {stale:?} are old; run UPDATE_README=1 cargo test documentation");
    }
}
