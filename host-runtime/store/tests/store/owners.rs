//! Owners of instances whose domain names none.

use virt_usb_model::ProjectId;
use virt_usb_store::release::Extent;

use crate::common::*;

fn project(name: &str) -> ProjectId {
    name.parse().unwrap()
}

#[test]
fn what_the_domain_says_comes_first() {
    let (_dir, mut store) = inventory();
    let whose = |store: &virt_usb_store::Store, own: Option<&ProjectId>| {
        store.claimant(instance(1), "vm", own).unwrap().project.map(|p| p.to_string())
    };
    assert_eq!(whose(&store, None), None);
    assert!(store.set_owner(instance(1), "vm", Some(&project("a")), &boot(1)).unwrap());
    assert!(
        !store.set_owner(instance(1), "vm", Some(&project("a")), &boot(1)).unwrap(),
        "it was so before"
    );
    assert_eq!(whose(&store, None).unwrap(), "a");
    assert_eq!(whose(&store, Some(&project("b"))).unwrap(), "b");
    assert!(store.set_owner(instance(1), "vm", None, &boot(1)).unwrap());
    assert!(!store.set_owner(instance(1), "vm", None, &boot(1)).unwrap());
    assert_eq!(whose(&store, None), None);
}

#[test]
fn what_it_holds_goes_with_it_and_it_ends_with_the_instance() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 1);
    claim(&mut store, 1, ANY).unwrap();
    let holder = |store: &virt_usb_store::Store| store.claims().unwrap()[0].project_id.clone();
    let before = store.host_document().unwrap().unwrap().revision;
    store.set_owner(instance(1), "vm", Some(&project("a")), &boot(1)).unwrap();
    store.set_owner(instance(2), "other", Some(&project("b")), &boot(1)).unwrap();
    assert_eq!(holder(&store).as_deref(), Some("a"));
    assert!(store.host_document().unwrap().unwrap().revision > before);
    // A forced release keeps the owner; the end of the instance removes it.
    store.release(instance(1), Extent::Everything, "a test", &boot(1)).unwrap();
    assert_eq!(store.owners().unwrap().len(), 2);
    store.release(instance(1), Extent::Gone, "a test", &boot(1)).unwrap();
    let left: Vec<String> = store.owners().unwrap().into_iter().map(|o| o.domain).collect();
    assert_eq!(left, ["other"]);
}
