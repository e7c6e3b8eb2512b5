//! The project's own rules, run as tests.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Every source file with its path below `src/`.
fn files() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(files.len() > 15, "the sources were found");
    files.sort();
    files
}

/// The source files without the files of unit tests.
fn sources() -> Vec<(String, String)> {
    files().into_iter().filter(|(name, _)| !name.ends_with("/tests.rs")).collect()
}

/// The code of a file: without comments, and without its unit tests at the end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("\n#[cfg(test)]\nmod ").or_else(|| text.find("\n#[cfg(all(test")).unwrap_or(text.len());
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or(line)))
        .filter(|(_, line)| !line.trim().is_empty())
}

/// The layers, lowest first, and the folders and files of `src/` that belong to each (ARCHITECTURE.md, "Layers"). A file
/// may name its own layer and lower ones.
const LAYERS: &[(&str, &[&str])] = &[
    ("sync", &["sync"]),
    ("words", &["bounded", "clock", "config", "envelope", "error", "event", "metrics"]),
    ("storage", &["storage"]),
    ("log", &["log"]),
    ("lane", &["lane"]),
    ("state", &["state"]),
    ("command", &["command"]),
    ("ingress", &["ingress"]),
    ("shard", &["shard"]),
    ("recovery", &["recovery"]),
    ("background", &["background"]),
    ("consumer", &["consumer"]),
    ("engine", &["engine"]),
    ("outside", &["kafka", "ops", "testing", "tools"]),
];

/// A module's path, without `crate`: `["log", "reader"]`.
type Module = Vec<String>;

/// The modules of the crate, and the names that they use of each other.
struct Modules {
    /// Their files and code, without comments and unit tests.
    code: BTreeMap<Module, (String, String)>,
    /// Names that a module re-exports with `pub use`, and their paths.
    passed_on: BTreeMap<Module, Module>,
}

/// Returns the `use` declarations: `true` for a re-export, and the path of each name.
fn uses(code: &str) -> Vec<(bool, Vec<String>)> {
    let mut uses = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find("use ") {
        let before = rest[..at].rsplit('\n').next().unwrap_or_default().trim();
        let (body, behind) = rest[at + 4..].split_once(';').unwrap_or((&rest[at + 4..], ""));
        let is_declaration = before.is_empty() || before.starts_with("pub");
        if is_declaration && body.chars().all(|c| c.is_alphanumeric() || "_:{}, *\n".contains(c)) {
            let body: String = body.split_whitespace().collect::<Vec<_>>().join(" ");
            uses.push((before.starts_with("pub"), leaves(&body, "")));
            rest = behind;
        } else {
            rest = &rest[at + 4..];
        }
    }
    uses
}

/// The single paths of a path with braces.
fn leaves(path: &str, prefix: &str) -> Vec<String> {
    let path = path.trim();
    let Some(open) = path.find('{') else {
        let name = path.split(" as ").next().unwrap_or(path);
        return vec![format!("{prefix}{name}").trim_end_matches("::self").to_owned()];
    };
    let (head, inner) = (&path[..open], &path[open + 1..path.rfind('}').unwrap_or(path.len())]);
    let (mut depth, mut from, mut found) = (0, 0, Vec::new());
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = &inner[from..at];
                from = (at + 1).min(inner.len());
                if !part.trim().is_empty() {
                    found.extend(leaves(part, &format!("{prefix}{head}")));
                }
            }
            _ => {}
        }
    }
    found
}

impl Modules {
    fn read() -> Self {
        let mut modules = Self { code: BTreeMap::new(), passed_on: BTreeMap::new() };
        for (file, text) in sources() {
            let mut path: Module = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
            if path.last().is_some_and(|last| last == "mod" || last == "lib") {
                path.pop();
            }
            if path.first().is_none_or(|first| first != "bin") {
                let code: String = code(&text).map(|(_, line)| format!("{line}\n")).collect();
                modules.code.insert(path, (file, code));
            }
        }
        for (module, (_, code)) in &modules.code {
            for leaf in uses(code).into_iter().filter(|(passes_on, _)| *passes_on).flat_map(|(_, leaves)| leaves) {
                let name = leaf.rsplit("::").next().unwrap_or_default().to_owned();
                if let Some(target) = modules.absolute(&leaf, module) {
                    modules.passed_on.insert([module.clone(), vec![name]].concat(), target);
                }
            }
        }
        modules
    }

    /// Returns a path as seen from the crate's root, or `None` if it belongs to another crate.
    fn absolute(&self, path: &str, module: &Module) -> Option<Module> {
        let mut parts = path.split("::").map(|part| part.trim().to_owned()).peekable();
        let mut base = module.clone();
        match parts.peek().map(String::as_str)? {
            "crate" => {
                parts.next();
                base.clear();
            }
            "super" | "self" => {
                while let Some(part) = parts.next_if(|part| part == "super" || part == "self") {
                    if part == "super" {
                        base.pop();
                    }
                }
            }
            first => {
                let child = [base.clone(), vec![first.to_owned()]].concat();
                self.code.contains_key(&child).then_some(())?;
            }
        }
        base.extend(parts);
        Some(base)
    }

    /// Returns the module whose file defines the item of a path.
    fn defining(&self, path: &Module) -> Option<Module> {
        let passed_on = (1..=path.len())
            .filter(|&len| !self.code.contains_key(&path[..len]))
            .find_map(|len| Some([self.passed_on.get(&path[..len])?.clone(), path[len..].to_vec()].concat()));
        match passed_on {
            Some(target) if target != *path => self.defining(&target),
            _ => (1..=path.len()).rev().map(|len| path[..len].to_vec()).find(|path| self.code.contains_key(path)),
        }
    }

    /// Returns every module with the modules that it names.
    fn named(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let mut named = BTreeMap::new();
        for (module, (_, code)) in &self.code {
            let mut paths: Vec<String> = Vec::new();
            for (passes_on, leaves) in uses(code) {
                if !passes_on {
                    paths.extend(leaves);
                }
            }
            for line in code.lines().filter(|line| !line.trim_start().starts_with("use ") && !line.contains(" use ")) {
                for root in ["crate::", "super::"] {
                    for (at, _) in line.match_indices(root) {
                        let path = line[at..].split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').next();
                        paths.extend(path.map(|path| path.trim_end_matches(':').to_owned()));
                    }
                }
            }
            let targets = paths.iter().filter_map(|path| self.defining(&self.absolute(path, module)?));
            named.insert(module, targets.filter(|target| target != module && !target.is_empty()).collect());
        }
        named
    }
}

/// A module's place in the order of the layers.
fn layer(module: &Module) -> Option<usize> {
    let first = module.first()?.as_str();
    LAYERS.iter().position(|(_, folders)| folders.contains(&first))
}

#[test]
fn a_file_names_only_its_own_layer_and_lower_ones() {
    let modules = Modules::read();
    let mut wrong = Vec::new();
    for (module, targets) in modules.named() {
        let (file, _) = &modules.code[module];
        if module.is_empty() {
            continue;
        }
        let Some(own) = layer(module) else { panic!("src/{file} is in no layer: add its folder to LAYERS") };
        let higher = targets.iter().filter(|target| layer(target).is_some_and(|layer| layer > own));
        wrong.extend(higher.map(|target| format!("src/{file} ({}) names {}", LAYERS[own].0, target.join("::"))));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_do_not_import_each_other_in_circles() {
    let modules = Modules::read();
    let named = modules.named();
    let reaches = |from: &Module, to: &Module| {
        let (mut seen, mut due) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = due.pop() {
            for target in named.get(&module).into_iter().flatten() {
                if target == to {
                    return true;
                }
                if seen.insert(target.clone()) {
                    due.push(target.clone());
                }
            }
        }
        false
    };
    let mut circles = Vec::new();
    for (module, targets) in &named {
        for target in targets.iter().filter(|target| reaches(target, module)) {
            circles.push(format!("src/{} and src/{}", modules.code[*module].0, modules.code[target].0));
        }
    }
    assert!(circles.is_empty(), "in a circle of imports:\n{}", circles.join("\n"));
}

#[test]
fn the_folders_are_the_layers_of_the_documents() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let rows: Vec<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    let mut at = 0;
    for row in rows {
        let found = text[at..].find(&format!("| `{row}`"));
        at += found.unwrap_or_else(|| panic!("ARCHITECTURE.md does not list the layer {row} in its order"));
    }
}

#[test]
fn unsafe_stays_where_it_is_argued() {
    let places = ["storage/memory.rs", "log/seal.rs", "sync/cpu.rs"];
    for (file, text) in sources() {
        if places.contains(&file.as_str()) {
            continue;
        }
        for (line, code) in code(&text) {
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(
                words.into_iter().all(|word| word != "unsafe"),
                "src/{file}:{line}: unsafe belongs into {places:?}"
            );
        }
    }
}

#[test]
fn atomics_and_threads_come_through_sync() {
    // Exceptions, and why:
    let excepted = [
        ("sync/mod.rs", "", "the importer"),
        ("sync/lock.rs", "std::sync::Mutex", "locks what `sync` imports"),
        ("sync/cpu.rs", "std::thread", "a sleep, and the number of cores"),
        ("sync/seed.rs", "std::sync::atomic", "two words of a process, set once; loom has no statics"),
        ("log/seal.rs", "std::sync::atomic", "an atomic view of mapped bytes, which loom cannot model"),
        ("engine/open.rs", "std::sync::atomic", "counts shards to recover, inside one scope"),
        ("ops/check.rs", "std::thread", "a sleep of a tool that reads files"),
        ("log/scan/mod.rs", "std::thread", "a sleep of a tool that reads files; no thread of the engine runs it"),
        ("log/scan/records.rs", "std::thread", "likewise"),
        ("engine/open.rs", "std::thread", "helpers inside one scope"),
        ("engine/threads.rs", "std::thread", "named threads and a sleep; loom models the protocols, not the engine"),
    ];
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            for what in ["std::sync::atomic", "std::sync::Mutex", "std::sync::RwLock", "std::thread", "core::sync"] {
                if code.contains(what) && !file.starts_with("tools/") {
                    let is_excepted =
                        excepted.iter().any(|(at, which, _)| *at == file && (which.is_empty() || *which == what));
                    assert!(is_excepted, "src/{file}:{line}: {what} comes through crate::sync");
                }
            }
        }
    }
}

#[test]
fn time_is_read_in_one_place() {
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            assert!(
                file == "clock.rs" || !code.contains("SystemTime::now"),
                "src/{file}:{line}: wall time is read by clock.rs"
            );
        }
    }
}

#[test]
fn files_stay_readable() {
    for (file, text) in files() {
        let lines = text.lines().count();
        assert!(lines <= 700, "src/{file} has {lines} lines, more than 700");
        for (line, code) in code(&text) {
            assert!(!code.contains("todo!(") && !code.contains("unimplemented!("), "src/{file}:{line}: unfinished");
            let says_its_job = text.starts_with("//!") || file == "lib.rs";
            assert!(line > 1 || says_its_job, "src/{file}: opens with its job");
        }
    }
}

#[test]
fn errors_are_not_dropped_unseen() {
    for (file, text) in sources() {
        for (line, code) in code(&text) {
            let code = code.trim_start();
            let dropped = code.strip_prefix("let _ = ").is_some_and(|what| what.find('(').is_some_and(|at| at > 0));
            assert!(!dropped, "src/{file}:{line}: a result dropped unseen");
        }
    }
}

/// Lines of a function, from its signature to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

#[test]
fn functions_stay_readable() {
    let mut long = Vec::new();
    for (file, text) in files() {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let words: Vec<&str> = line.trim_start().split(' ').take_while(|word| !word.contains('(')).collect();
            let is_function = line.contains('(')
                && line.trim_start().starts_with(['p', 'f', 'c', 'u', 'a', 'e'])
                && (words.contains(&"fn") || line.trim_start().starts_with("fn "));
            if !is_function || line.trim_end().ends_with(';') || line.contains('$') {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indent));
            let Some(length) = lines[at..].iter().position(|line| *line == end) else { continue };
            if length + 1 > FUNCTION_LINES_MAX {
                long.push(format!("src/{file}:{}: {} lines", at + 1, length + 1));
            }
        }
    }
    assert!(long.is_empty(), "functions of more than {FUNCTION_LINES_MAX} lines:\n{}", long.join("\n"));
}

/// Wordings that a reader must read twice; `CONTRIBUTING.md` gives better ones.
const REFUSED: &[&str] = &[
    "so many",
    "brought near",
    "bring near",
    "way in",
    "check sum",
    "was had",
    "is had",
    "in the eyes of",
    "of which the",
    "what became of",
];
const PRONOUNS: &[&str] = &["who", "whoever"];
const VERBS: &[&str] = &["waits", "wants", "looks", "asks", "has", "is", "drives", "sees", "reads", "writes", "may"];

/// Returns the first refused wording of a text.
fn refused_wording(text: &str) -> Option<String> {
    let words: Vec<String> = text
        .split(|c: char| !c.is_alphanumeric() && c != '\'')
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    let pair = words.windows(2).find(|pair| PRONOUNS.contains(&&*pair[0]) && VERBS.contains(&&*pair[1]));
    let phrase = |phrase: &&&str| {
        let phrase: Vec<&str> = phrase.split(' ').collect();
        words.windows(phrase.len()).any(|words| words == phrase)
    };
    pair.map(|pair| pair.join(" ")).or_else(|| REFUSED.iter().find(phrase).map(|phrase| (*phrase).to_owned()))
}

/// Every file with sentences: sources, tests, examples and documents, by its path.
fn texts() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if matches!(extension, Some("rs" | "md" | "toml" | "sh")) && name != "tidy.rs" {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                texts.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    texts.sort();
    texts
}

#[test]
fn sentences_are_plain_english() {
    let mut wrong = Vec::new();
    for (file, text) in texts() {
        if file == "CONTRIBUTING.md" {
            // This file quotes the refused wordings.
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            // A phrase may go over the end of a line.
            let next = lines.get(at + 1).map_or("", |next| next.trim_start().trim_start_matches(['/', '!', '#']));
            let next = next.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
            if let Some(phrase) = refused_wording(line).or_else(|| {
                let last = line.split_whitespace().rev().take(2).collect::<Vec<_>>().into_iter().rev();
                refused_wording(&format!("{} {next}", last.collect::<Vec<_>>().join(" ")))
            }) {
                wrong.push(format!("{file}:{}: \"{phrase}\"", at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{} sentences to rewrite:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn refused_wordings_are_found() {
    for text in ["for who waits", "Who has it.", "each time so many orders", "brought near", "a run of which the end"] {
        assert!(refused_wording(text).is_some(), "{text}");
    }
    for text in ["the thread that waits", "so much, many times", "away in time", "whoever comes"] {
        assert_eq!(refused_wording(text), None, "{text}");
    }
}

#[test]
fn documents_name_only_tests_that_exist() {
    let texts = texts();
    let defined: BTreeSet<&str> = texts
        .iter()
        .filter(|(file, _)| file.ends_with(".rs"))
        .flat_map(|(_, text)| text.split("fn ").skip(1))
        .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default())
        .collect();
    let mut missing = Vec::new();
    for (file, text) in texts.iter().filter(|(file, _)| file.ends_with(".md") && file != "CHANGELOG.md") {
        // `file.rs: name`, or `…: name` for another test of the same file.
        for named in text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(": ").map(|(_, name)| name)) {
            let is_name =
                named.len() > 12 && named.contains('_') && named.chars().all(|c| c.is_alphanumeric() || c == '_');
            if is_name && !defined.contains(named) {
                missing.push(format!("{file} names {named}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}
