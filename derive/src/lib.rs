//! The derive macro for corelane's trait `Bounded`. Use it through the crate `corelane`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Expr, Field, GenericParam, Token, parse_quote};

/// Implements `Bounded` with the depth of the deepest field plus one. A type that contains itself does not compile.
///
/// For a field whose type does not implement `Bounded`, give the depth at the field: `#[bounded(depth = 2)]`.
#[proc_macro_derive(Bounded, attributes(bounded))]
pub fn derive_bounded(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as DeriveInput);
    expand(input).unwrap_or_else(|error| error.into_compile_error()).into()
}

fn expand(mut input: DeriveInput) -> syn::Result<TokenStream> {
    let fields: Vec<&Field> = match &input.data {
        Data::Struct(data) => data.fields.iter().collect(),
        Data::Enum(data) => data.variants.iter().flat_map(|variant| &variant.fields).collect(),
        Data::Union(data) => {
            return Err(syn::Error::new_spanned(data.union_token, "`Bounded` cannot be derived for a union"));
        }
    };
    let depths = fields.into_iter().map(depth).collect::<syn::Result<Vec<_>>>()?;
    for param in &mut input.generics.params {
        if let GenericParam::Type(param) = param {
            param.bounds.push(parse_quote!(::corelane::Bounded));
        }
    }
    let name = &input.ident;
    let (impl_generics, ty_generics, where_clause) = input.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::corelane::Bounded for #name #ty_generics #where_clause {
            const DEPTH: u32 = {
                let mut deepest: u32 = 0;
                #(
                    let depth: u32 = #depths;
                    if depth > deepest {
                        deepest = depth;
                    }
                )*
                deepest + 1
            };
        }
    })
}

/// Returns the depth of a field: that of its attribute or, without one, that of its type.
fn depth(field: &Field) -> syn::Result<TokenStream> {
    let mut given: Option<Expr> = None;
    for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("bounded")) {
        attribute.parse_nested_meta(|meta| {
            if !meta.path.is_ident("depth") {
                return Err(meta.error("unknown option; the only one is `depth`: #[bounded(depth = 2)]"));
            }
            meta.input.parse::<Token![=]>()?;
            given = Some(meta.input.parse()?);
            Ok(())
        })?;
    }
    let ty = &field.ty;
    Ok(match given {
        Some(depth) => quote!(#depth),
        None => quote!(<#ty as ::corelane::Bounded>::DEPTH),
    })
}
