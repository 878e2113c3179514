//! Files as documents. All that cannot be read is told at once, before anything is written.

use crate::console::wrong;
use forebay_schemas::{Document, Format, Tenant, topics::MESSAGE_BYTES_MAX};
use std::path::{Path, PathBuf};

/// The most files that one command takes.
const FILES_MAX: usize = 100_000;

/// The documents in these files and folders; a document's id is its path as it was given.
pub fn read(paths: &[PathBuf], tenant: &Tenant) -> anyhow::Result<Vec<Document>> {
    let mut files = Vec::new();
    let mut faults = Vec::new();
    for path in paths {
        collect(path, true, &mut files, &mut faults);
    }
    let mut documents = Vec::new();
    for file in files {
        match document(&file, tenant) {
            Ok(document) => documents.push(document),
            Err(fault) => faults.push(fault),
        }
    }
    if documents.is_empty() && faults.is_empty() {
        faults.push("no Markdown or text file is there (.md, .markdown, .txt, .text)".to_owned());
    }
    match faults.is_empty() {
        true => Ok(documents),
        false => Err(wrong(faults.join("\n"))),
    }
}

/// The id of the document that this file is.
pub fn id(path: &Path) -> String {
    path.strip_prefix(".").unwrap_or(path).to_string_lossy().into_owned()
}

/// The format that a file's name tells; none where Forebay does not read such files.
fn format(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "md" | "markdown" => Some(Format::Markdown),
        "txt" | "text" => Some(Format::Text),
        _ => None,
    }
}

fn collect(path: &Path, named: bool, files: &mut Vec<PathBuf>, faults: &mut Vec<String>) {
    if files.len() >= FILES_MAX {
        return;
    }
    if path.is_dir() {
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(fault) => return faults.push(format!("could not read folder {}: {fault}", path.display())),
        };
        let mut inside: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        // The same order on every machine.
        inside.sort();
        let hidden =
            |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        for path in inside.iter().filter(|path| !hidden(path) && !path.is_symlink()) {
            collect(path, false, files, faults);
        }
    } else if format(path).is_some() || named {
        // A file that was named is read whatever it is called.
        files.push(path.to_owned());
    }
}

fn document(path: &Path, tenant: &Tenant) -> Result<Document, String> {
    let shown = path.display();
    let bytes = std::fs::read(path).map_err(|fault| format!("could not read {shown}: {fault}"))?;
    let text = String::from_utf8(bytes).map_err(|fault| {
        format!(
            "could not read {shown}: byte {} is not UTF-8; convert the file",
            fault.utf8_error().valid_up_to()
        )
    })?;
    // Quotes and line breaks take two bytes in JSON; the broker has the last word.
    if text.len() > MESSAGE_BYTES_MAX {
        return Err(format!(
            "{shown} has {} bytes; a document may have {MESSAGE_BYTES_MAX}; split the file",
            text.len()
        ));
    }
    let format = format(path).unwrap_or_default();
    Ok(Document { id: id(path), tenant: tenant.clone(), format, text: Some(text) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_cannot_be_read_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.md"), b"ok").unwrap();
        std::fs::write(folder.path().join("b.txt"), b"ab\xff").unwrap();
        std::fs::write(folder.path().join("c.png"), b"\xff").unwrap();
        let missing = folder.path().join("missing.md");
        let refused = read(&[folder.path().to_owned(), missing], &Tenant::default()).unwrap_err().to_string();
        assert!(refused.contains("b.txt: byte 2 is not UTF-8"), "{refused}");
        assert!(refused.contains("missing.md"), "{refused}");
        assert!(!refused.contains("c.png"), "a folder's other files are passed over: {refused}");
    }
}
