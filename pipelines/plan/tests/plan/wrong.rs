//! Every file of `wrong/` is refused with the report beside it: all faults, each with its place and a hint.

use crate::support::{Operators, folder, golden};
use forebay_plan::{cases, plan, utf8};

/// Files that a mistake could have made. Those that begin with `case-` are cases of a pipeline.
const FILES_MIN: usize = 25;

#[test]
fn a_wrong_file_is_refused_with_all_its_faults() {
    let wrong = folder().join("plan/tests/wrong");
    let mut names: Vec<String> = std::fs::read_dir(&wrong)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    names.sort();
    assert!(names.len() >= FILES_MIN, "{} files", names.len());
    for name in names {
        let bytes = std::fs::read(wrong.join(&name)).unwrap();
        let report = match utf8(&name, &bytes) {
            Err(faults) => format!("{faults}\n"),
            Ok(text) if name.starts_with("case-") => match cases::parse(&name, text) {
                Err(faults) => format!("{faults}\n"),
                Ok(_) => panic!("{name} passes"),
            },
            Ok(text) => match plan(&name, text, &Operators) {
                Err(faults) => format!("{faults}\n"),
                // A warning is a report too.
                Ok(plan) if !plan.warnings.is_empty() => format!("warnings\n{}\n", plan.warnings),
                Ok(_) => panic!("{name} passes"),
            },
        };
        golden(&format!("plan/tests/wrong/{}.txt", name.trim_end_matches(".yaml")), &report);
    }
}
