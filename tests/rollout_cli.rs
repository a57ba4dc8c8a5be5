//! The command line as operators use it: the binary itself, against a server in this process.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::{Value, json};
use tidegate::{api::auth::Token, config::Config};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{
    rollout_api::{held, start_held},
    support::{Repository, Running, config, eventually, start},
};

/// What a command printed, and how it ended.
struct Done {
    code: i32,
    out: String,
    err: String,
}

impl Done {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("{}{}", self.out, self.err))
    }

    /// The same, of a command that went well.
    fn good(self) -> Self {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self
    }

    /// What a command says that did not go well.
    fn refused(self) -> String {
        assert_eq!((self.code, self.out.as_str()), (1, ""), "{}", self.err);
        self.err
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

fn command(words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    let inherited = std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(|n| n.starts_with("TIDEGATE_")));
    for (name, _) in inherited {
        command.env_remove(name);
    }
    command.args(words.split_whitespace()).env("USER", "ada");
    command
}

/// Runs `tidegate` with these words and the server's address.
async fn tidegate(running: &Running, words: &str) -> Done {
    let mut command = command(words);
    command.env("TIDEGATE_OPS", running.ops.trim_start_matches("http://"));
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap().into()
}

async fn status(running: &Running) -> Value {
    tidegate(running, "rollout status m --json").await.good().json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_steered_from_start_to_abort() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    let none = tidegate(&running, "rollout status m").await.refused();
    assert!(none.contains("has had no rollout") && none.contains("(tidegate rollout start m --to VERSION)"), "{none}");
    let unknown = tidegate(&running, "rollout start nosuch --to 2").await.refused();
    assert!(unknown.contains("unknown model 'nosuch'") && unknown.contains("`tidegate models`"), "{unknown}");
    let wrong = tidegate(&running, "rollout start m --to 2 --steps 10,5,100").await.refused();
    assert!(wrong.contains("got 10 and then 5 percent"), "{wrong}");
    let wrong = tidegate(&running, "rollout start m --to 2 --sticky cookie:x").await.refused();
    assert!(wrong.contains("field 'sticky' in line 1: sticky must be header:NAME"), "{wrong}");

    let options = "--to 2 --steps 10,50,100 --every 1h --shadow 100 --sticky header:X-User --manual --min-samples 7";
    let shown = tidegate(&running, &format!("rollout start m {options} --reason better")).await.good().out;
    assert!(shown.starts_with("rollout m/r1: version 1 → 2, "), "{shown}");
    eventually("copies are made", async || status(&running).await["phase"] == "shadow").await;
    let document = status(&running).await;
    assert_eq!((&document["sticky"], &document["shadow"]["weight_percent"]), (&json!("header:x-user"), &json!(100.0)));
    let step = json!({ "weight_percent": 50.0, "min_duration_seconds": 3600.0, "min_samples": 7,
                       "max_duration_seconds": 36000.0, "pause": true });
    assert_eq!(document["steps"][1], step);
    let shown = tidegate(&running, "rollout status m").await.good().out;
    assert!(shown.contains("▶ shadow 100 %  · 10 %  · 50 %  · 100 %") && shown.contains("pending → shadow"), "{shown}");

    assert_eq!(tidegate(&running, "rollout pause m --json").await.good().json()["phase"], "paused");
    let shown = tidegate(&running, "rollout resume m").await.good().out;
    assert!(shown.contains("shadow for"), "{shown}");
    let advanced = tidegate(&running, "rollout advance m --reason now --json").await.good().json();
    assert_eq!((&advanced["phase"], &advanced["weight_percent"]), (&json!("canary"), &json!(10.0)));
    let busy = tidegate(&running, "rollout start m --to 2").await.refused();
    assert!(busy.contains("abort it first") && busy.contains("its rollout is canary"), "{busy}");
    let busy = tidegate(&running, "rollout set m 5").await.refused();
    assert!(busy.contains("rollout 'm/r1' divides its requests"), "{busy}");
    let aborted = tidegate(&running, "rollout abort m").await.good().out;
    assert!(aborted.contains("aborted for") && aborted.contains("✓ shadow 100 %  ✗ 10 %"), "{aborted}");
    let over = tidegate(&running, "rollout resume m").await.refused();
    assert!(over.contains("is aborted") && over.contains("`tidegate rollout status m`"), "{over}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_called_by_names() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 2.0");
    let running = start(&config(&repository)).await;
    let told = tidegate(&running, "models alias m champion 1 --reason sound").await.good();
    assert_eq!(told.out, "m: champion is version 1\n");
    let champion = running.ops("/admin/v1/audit").await.1["entries"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&champion["author"], &champion["reason"]), (&json!("ada"), &json!("sound")));
    eventually("it serves", async || {
        tidegate(&running, "models").await.good().out.contains(" 1*         ready      champion")
    })
    .await;
    let told = tidegate(&running, "models alias m champion --remove").await.good();
    assert_eq!(told.out, "m: champion is no version\n");
    let unknown = tidegate(&running, "models alias m champion 9").await.refused();
    assert!(unknown.contains("has no version '9'"), "{unknown}");
    for wrong in ["models alias m champion", "models alias m latest 1", "models alias m champion 1 --remove"] {
        assert_eq!(tidegate(&running, wrong).await.code, 2, "{wrong}");
    }
    running.stop().await;
}

/// Requests for `m`, one after the other, until it is told to stop; how many were not answered well.
fn load(running: &Arc<Running>, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<usize> {
    let (running, stop) = (running.clone(), stop.clone());
    tokio::spawn(async move {
        let mut failed = 0;
        while !stop.load(Ordering::Relaxed) {
            failed += usize::from(running.infer("m", &[1.0]).await.status != 200);
        }
        failed
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_rollout_is_told_to_its_end() {
    let repository = Repository::with("m", "scale = 2.0");
    repository.settings("m", "[rollout]\non_new_version = \"hold\"\nwatch = \"300ms\"\nlatency_objective = \"10s\"\n");
    let running = Arc::new(start_held(&repository, &config(&repository)).await);
    let stop = Arc::new(AtomicBool::new(false));
    let loads = [load(&running, &stop), load(&running, &stop)];
    let options = "--to 2 --steps 50,100 --every 300ms --min-samples 20 --watch";
    let done = tidegate(&running, &format!("rollout start m {options}")).await.good();
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        assert_eq!(load.await.unwrap(), 0);
    }
    let changes: Vec<&str> = done.out.lines().filter(|line| line.contains("Z  ")).collect();
    let phases =
        ["pending → canary", "canary → canary", "canary → promoting", "promoting → watching", "watching → done"];
    assert_eq!(changes.len(), phases.len(), "{}", done.out);
    for (line, phase) in changes.iter().zip(phases) {
        assert!(line.contains(phase), "{line}");
    }
    assert!(done.out.contains("✓ 50 %  ✓ 100 %") && !done.out.contains('\x1b'), "{}", done.out);
    assert!(done.out.contains("good     errors: candidate 0.00 %"), "{}", done.out);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_resumes_is_told_what_comes_next() {
    let repository = Repository::with("m", "scale = 2.0");
    repository.settings("m", "[rollout]\non_new_version = \"hold\"\nlatency_objective = \"10s\"\n");
    let running = Arc::new(start_held(&repository, &config(&repository)).await);
    let stop = Arc::new(AtomicBool::new(false));
    let load = load(&running, &stop);
    let options = "--to 2 --steps 50,75,100 --every 300ms --min-samples 20 --manual";
    tidegate(&running, &format!("rollout start m {options}")).await.good();
    eventually("the first step is passed", async || status(&running).await["passed"] == true).await;
    assert_eq!(status(&running).await["phase"], "paused");
    // The next step shall not be passed.
    stop.store(true, Ordering::Relaxed);
    assert_eq!(load.await.unwrap(), 0);
    let shown = tidegate(&running, "rollout status m").await.good().out;
    assert!(
        shown.contains("it has passed this step: on to what comes next with `tidegate rollout resume m`"),
        "{shown}"
    );
    let resumed = tidegate(&running, "rollout resume m --json").await.good().json();
    assert_eq!((&resumed["step"], &resumed["passed"]), (&json!(1), &json!(false)));
    tidegate(&running, "rollout pause m").await.good();
    let shown = tidegate(&running, "rollout status m").await.good().out;
    assert!(shown.contains("`tidegate rollout advance m`, back to this one with resume"), "{shown}");
    let resumed = tidegate(&running, "rollout resume m --json").await.good().json();
    assert_eq!((&resumed["phase"], &resumed["step"]), (&json!("canary"), &json!(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_rollout_that_is_given_up_ends_with_1() {
    let repository = held();
    let running = Arc::new(start_held(&repository, &config(&repository)).await);
    tidegate(&running, "rollout start m --to 2 --every 1h").await.good();
    let watched = tokio::spawn({
        let running = running.clone();
        async move { tidegate(&running, "rollout status m --watch --json").await }
    });
    eventually("it is at the first step", async || status(&running).await["phase"] == "canary").await;
    tidegate(&running, "rollout abort m --reason enough").await.good();
    let done = watched.await.unwrap();
    assert_eq!(done.code, 1, "{}{}", done.out, done.err);
    let last: Value = serde_json::from_str(done.out.lines().last().unwrap()).unwrap();
    assert_eq!((&last["phase"], &last["reason"]), (&json!("aborted"), &json!("enough")));
}

/// An address that stays while the server behind it comes and goes; `None` for as long as it is away.
struct Relay {
    address: SocketAddr,
    server: watch::Sender<Option<SocketAddr>>,
}

impl Relay {
    async fn to(server: &Running) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = Self { address: listener.local_addr().unwrap(), server: watch::Sender::new(Some(ops(server))) };
        let server = relay.server.subscribe();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let Some(server) = *server.borrow() else { continue };
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        relay
    }
}

fn ops(running: &Running) -> SocketAddr {
    running.ops.trim_start_matches("http://").parse().unwrap()
}

/// The server stops and comes back; whoever watches sees the same rollout go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_watches_outlasts_a_restart() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    tidegate(&running, "rollout start m --to 2 --every 1h").await.good();
    eventually("it is at the first step", async || status(&running).await["phase"] == "canary").await;
    let relay = Relay::to(&running).await;
    let address = relay.address.to_string();
    let mut watching =
        command("rollout status m --watch").env("TIDEGATE_OPS", address).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("pending → canary"), "it is seen before the server stops");
    relay.server.send_replace(None);
    running.stop().await;
    let running = start(&config(&repository)).await;
    relay.server.send_replace(Some(ops(&running)));
    tidegate(&running, "rollout abort m --reason enough").await.good();
    let rest: Vec<String> = tokio::task::spawn_blocking(move || lines.map(Result::unwrap).collect()).await.unwrap();
    assert!(rest[0].contains("canary → aborted at 0 %: enough"), "{rest:?}");
    assert_eq!(watching.wait().unwrap().code(), Some(1));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_is_set_by_hand_and_cleared() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    let unsaid = tidegate(&running, "rollout set m 25").await.refused();
    assert!(unsaid.contains("name its version with --to VERSION (loaded besides the stable one: 2)"), "{unsaid}");
    let set = tidegate(&running, "rollout set m 25 --to 2 --reason careful").await.good().out;
    assert_eq!(set, "m: 25 % to version 2 (canary)\nm: the rest to version 1 (stable)\n");
    let id = running.ops("/admin/v1/models/m").await.1["route"]["id"].clone();
    let set = tidegate(&running, "rollout set m 0.5 --json").await.good().json();
    assert_eq!((&set["route"]["arms"][0]["percent"], &set["route"]["id"]), (&json!(0.5), &id));
    let wrong = tidegate(&running, "rollout set m 101").await.refused();
    assert!(wrong.contains("field 'canary.percent': a weight must be 0 to 100 percent, got 101"), "{wrong}");

    let listed = tidegate(&running, "rollout overrides").await.good().out;
    assert_eq!(listed, "m: route by hand: 1 (stable), 0.5 % 2 (canary); by ada\n");
    assert_eq!(tidegate(&running, "rollout overrides clear m").await.good().out, "cleared m\n");
    let listed = tidegate(&running, "rollout overrides").await.good().out;
    assert_eq!(listed, "everything is as the repository has it\n");
    assert!(tidegate(&running, "rollout overrides clear").await.good().out.contains("there were no overrides"));
    let models = tidegate(&running, "models --json").await.good().json();
    assert_eq!((&models[0]["name"], &models[0]["route"]), (&json!("m"), &Value::Null));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_told_and_verified_with_a_server_and_without() {
    let repository = held();
    let config = config(&repository);
    let running = start_held(&repository, &config).await;
    // More than one answer of the server holds.
    for percent in 0..105 {
        let body =
            json!({ "canary": { "version": "2", "percent": percent % 100 }, "reason": format!("try {percent}") });
        let uri = format!("{}/admin/v1/models/m/route", running.ops);
        let request = http::Request::put(uri).body(body.to_string().into()).unwrap();
        assert_eq!(running.send(request).await.unwrap().status, 200);
    }
    let told = tidegate(&running, "audit m").await.good().out;
    assert_eq!(told.lines().count(), 106, "{told}");
    assert!(told.lines().last().unwrap().ends_with("m  route by operator: try 104"), "{told}");
    assert_eq!(
        tidegate(&running, "audit --since 1h --json").await.good().json()["entries"].as_array().unwrap().len(),
        106
    );
    assert_eq!(tidegate(&running, "audit --since 2100-01-01T00:00:00Z").await.good().out, "");
    let wrong = tidegate(&running, "audit --since yesterday").await.refused();
    assert!(wrong.contains("'since' must be a time"), "{wrong}");

    let verify = format!("audit verify --data {}", config.data_directory().display());
    let last = tidegate(&running, "audit --json").await.good().json()["entries"][105]["hash"].clone();
    let head = last.as_str().unwrap();
    let whole = format!("106 entries, all as they were written; the last has the hash\n{head}\n");
    assert_eq!(tidegate(&running, &verify).await.good().out, whole);
    running.stop().await;
    let verified = |options: &str| Done::from(command(&format!("{verify} {options}")).output().unwrap());
    assert_eq!(verified("").good().out, whole);
    let whole = verified(&format!("--head {head} --json")).good().json();
    assert_eq!(whole, json!({ "whole": true, "entries": 106, "head": head }));
    let other = verified(&format!("--head {}", "0".repeat(64)));
    assert!(other.code == 2 && other.out.contains("none of 106 audit entries has the hash"), "{}", other.out);
    let wrong = verified("--head last");
    assert!(wrong.code == 2 && wrong.err.contains("64 hexadecimal digits"), "{}", wrong.err);

    let file = rusqlite::Connection::open(config.data_directory().join("state.sqlite")).unwrap();
    file.execute("DELETE FROM audit WHERE number > 50", []).unwrap();
    let cut = "audit entries are missing at the end: 106 were written, 50 are there";
    let broken = verified("");
    assert!(broken.code == 2 && broken.out.contains(&format!("is broken: {cut}")), "{}{}", broken.out, broken.err);
    let broken = verified("--json");
    assert_eq!((broken.code, broken.json()), (2, json!({ "whole": false, "error": cut })));
    file.execute_batch("DROP TABLE audit").unwrap();
    drop(file);
    assert!(verified("--json").refused().contains("cannot be verified"));
    let missing = Done::from(command("audit verify --data /nonexistent").output().unwrap()).refused();
    assert!(missing.contains("name another folder with --data"), "{missing}");
    assert!(!std::path::Path::new("/nonexistent").exists());
}

/// The data directory is where the server's own configuration says, whichever way that is named.
#[test]
fn a_log_is_verified_where_the_configuration_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let (data, file) = (folder.path().join("state"), folder.path().join("tidegate.toml"));
    std::fs::write(&file, format!("data = {data:?}\n")).unwrap();
    let name = file.display();
    let by_option = command(&format!("audit verify --config {name}")).output().unwrap();
    let by_variable = command("audit verify").env("TIDEGATE_CONFIG", &file).output().unwrap();
    for missing in [by_option, by_variable] {
        let missing = Done::from(missing).refused();
        assert!(missing.contains(&format!("the audit log in {} cannot be verified", data.display())), "{missing}");
    }
}

/// Whoever reads what a command prints may stop before its end, as `head` does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_pipe_ends_a_command_quietly() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    // What is a number of its own is the answer itself.
    for (words, code) in
        [("models", 141), ("models --json", 141), ("rollout overrides", 141), ("config --defaults", 141), ("health", 0)]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = command(words);
        command.env("TIDEGATE_OPS", running.ops.trim_start_matches("http://")).stdout(writer);
        command.stderr(Stdio::piped());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), complaint.as_str()), (Some(code), ""), "{words}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_model_says_does_not_reach_the_terminal_unseen() {
    let repository = Repository::with("m", "");
    repository.put("evil", "1", "good\u{202e}\u{1b}[2J = 1");
    let running = start(&config(&repository)).await;
    let unseen = |text: &str| text.contains(['\u{1b}', '\u{202e}']);
    let (_, document) = running.ops("/admin/v1/models/evil").await;
    let reason = document["versions"][0]["reason"].as_str().unwrap();
    assert!(unseen(reason), "the server tells it as it is: {reason:?}");
    let listed = tidegate(&running, "models").await.good().out;
    assert!(listed.contains("\\u{202e}") && !unseen(&listed), "{listed:?}");
    assert_eq!(listed.lines().count(), 3, "one line each: {listed}");
    let listed = tidegate(&running, "models --json").await.good();
    assert!(!unseen(&listed.out), "{:?}", listed.out);
    assert_eq!(listed.json()[0]["versions"][0]["reason"], reason);
    let refused = tidegate(&running, "rollout start m --to 2 --sticky \u{202e}").await.refused();
    assert!(!unseen(&refused) && refused.contains("\\u{202e}"), "{refused:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_token_or_a_server_the_next_step_is_told() {
    let repository = Repository::with("m", "");
    let token = Some(Token::parse("s3cret".to_owned()).unwrap());
    let running = start(&Config { token, ..config(&repository) }).await;
    let refused = tidegate(&running, "rollout set m 5 --to 2").await.refused();
    assert!(refused.contains("changes need this server's token") && refused.contains("--token or TIDEGATE_TOKEN"));
    let refused = tidegate(&running, "rollout set m 5 --to 2 --token wrong").await.refused();
    assert!(refused.contains("the bearer token is not this server's"), "{refused}");
    let known = tidegate(&running, "rollout --token s3cret set m 5 --to 2").await.refused();
    assert!(known.contains("has no version '2'"), "{known}");
    running.stop().await;
    let alone = Done::from(command("rollout status m --ops 127.0.0.1:1").output().unwrap()).refused();
    assert!(alone.contains("no server answers at 127.0.0.1:1; name another with --ops or TIDEGATE_OPS"), "{alone}");
    let wrong = Done::from(command("rollout status m --ops localhost").output().unwrap());
    assert!(wrong.code == 2 && wrong.err.contains("HOST:PORT"), "{}", wrong.err);
}
